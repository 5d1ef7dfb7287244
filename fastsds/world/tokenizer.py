"""The byte-level BPE that the embedded student and teacher share: any caption has tokens, at most 1,024 of them."""

import json
from pathlib import Path

from fastsds.world.scenes import WorldSource

CONTEXT = 20
VOCABULARY = 1024
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(folder: Path, samples: int = 4096) -> int:
    """Write a CLIPTokenizer (vocab.json, merges.txt) trained on world captions; return its vocabulary size.

    All 256 bytes are in it, alone and word-final, so that no text is unknown. END has the highest id: CLIP's text
    tower finds the pooled token by argmax.
    """
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 256 - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(WorldSource().scenes(torch.arange(samples)).captions(), trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in learnt["merges"]]
    words = alphabet + [c + "</w>" for c in alphabet]
    words += [w for w in ("".join(m) for m in merges) if w not in set(words)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words + [START, END]))}
    folder.mkdir(parents=True, exist_ok=True)
    CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
    ).save_pretrained(folder)
    return len(vocabulary)
