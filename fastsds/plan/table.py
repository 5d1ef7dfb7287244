"""A plan for people: one aligned line a number."""

from fastsds.progress import clock

ROWS = {  # of bytes_a_rank, in order
    "weights": "student: weights",
    "masters": "student: fp32 masters",
    "moments": "student: optimizer's moments",
    "gradients": "student: gradients",
    "buffers": "student: ZeRO 3's buffers, and what stays gathered",
    "bucket": "student: the gradients' bucket",
    "gathered": "student: weights gathered while it runs",
    "teacher_unet": "teacher: UNet",
    "teacher_text": "teacher: text encoder",
    "teacher_vae": "teacher: VAE",
    "captions": "teacher: captions kept",
    "batch": "batch",
    "student_activations": "student: activations, {a_rank} images",
    "student_peak": "student: peak of forward and backward",
    "contrast": "contrastive loss, {contrastive} x {contrastive}",
    "teacher_peak": "teacher: peak, {at_a_time} images at a time",
    "optimizer_step": "optimizer: while it steps",
}
PHASES = {
    "start": "the head's start",
    "between": "between steps",
    "ask": "the teacher is asked",
    "backward": "the student's backward pass",
    "step": "the optimizer steps",
}


def size(n: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def flop(n: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if n < 1000:
            return f"{n:.3g} {unit}FLOP"
        n /= 1000
    return f"{n:.4g} PFLOP"


def table(found: dict) -> str:
    """Lay out `command.summary`."""
    batch, peak = found["batch"], found["peak"]
    sections = [
        (found["engine"], {}),
        ("parameters", {name.replace("_", ": "): f"{n:,}" for name, n in found["parameters"].items()}),
        (
            "bytes of a rank",
            {text.format(**batch): size(found["bytes_a_rank"][k]) for k, text in ROWS.items() if found["bytes_a_rank"].get(k)},
        ),
        (
            "peak of a rank",
            {text: size(peak[k]) + (" <-" if k == peak["fullest"] else "") for k, text in PHASES.items() if peak[k]},
        ),
        (
            f"FLOP of a step, {batch['contrastive']} x {batch['accumulation']} images",
            {name: flop(n) for name, n in found["flop_a_step"].items()},
        ),
    ]
    if speed := found.get("speed"):
        what = f"speed at {100 * speed['mfu']:.0f} % of {speed['tflops']:,.0f} TFLOP/s a card"
        sections.append((what, {"images/s": f"{speed['images_per_s']:,.0f}", "seconds a step": f"{speed['step_seconds']:.3g}"}))
    if bank := found.get("bank"):
        rows = {"a pair": size(bank["bytes_a_row"]), "FLOP a pair": flop(bank["flop_a_row"])}
        if "bytes" in bank:
            rows[f"{bank['rows']:,} pairs"] = size(bank["bytes"])
        rows["peak of a rank while it is built"] = size(bank["peak"])
        if "seconds" in bank:
            rows["time to build"] = clock(bank["seconds"])
        sections.append(("bank", rows))
    if card := found.get("card"):
        what = f"a card of which a run may take {size(card['limit'])}"
        rows = {"this recipe": "fits" if card["fits"] else "DOES NOT FIT", "largest data.batch": f"{card['largest_batch']:,}"}
        if "largest_micro_batch" in card:
            rows["largest teacher.micro_batch"] = f"{card['largest_micro_batch']:,}"
        sections.append((what, rows))
    width = max(len(name) for _, rows in sections for name in rows) + 2
    right = max(len(value.removesuffix(" <-")) for _, rows in sections for value in rows.values())
    lines = []
    for title, rows in sections:
        lines += ["", title] if lines else [title]
        for name, value in rows.items():
            number, arrow, _ = value.partition(" <-")
            lines.append(f"  {name:<{width}}{number:>{right}}{arrow}")
    return "\n".join([*lines, "", *found["notes"]])
