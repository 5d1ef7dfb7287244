"""CLIP's tokenizer, built from the vocabulary that open_clip ships: an ldm checkpoint comes without one."""

import gzip

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT = 77


def clip_tokenizer(pad: str):
    """The CLIPTokenizer of SD 1.x (pad END) or SD 2.x (pad "!", id 0).

    Its ids are those of open_clip's tokenizer, which also repairs mojibake and HTML entities (ftfy) before it looks;
    diffusers' tokenizers do not. In a caption "!" stays the word that it is: as the padding of a saved tokenizer,
    transformers would read it as padding there too.
    """
    from open_clip.tokenizer import default_bpe
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())  # bytes that print as themselves first: CLIP's order
    words = letters + [letter + "</w>" for letter in letters]
    room = 49408 - len(words) - 2  # the file goes on; CLIP was trained with this many of its merges
    with gzip.open(default_bpe(), "rt", encoding="utf-8", newline="\n") as file:
        next(file)  # a line about the file
        merges = [tuple(next(file).split()) for _ in range(room)]
    words += ["".join(merge) for merge in merges] + [START, END]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, merges, model_max_length=CONTEXT)
    tokenizer.pad_token = pad
    return tokenizer

