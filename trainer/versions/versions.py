"""Differences between the supported versions of torch and transformers.

Everything else is written once, for the newest names. What each older version lacks:

    torch 2.9 to 2.12         collectives of one tensor have other names
    transformers 4            CLIP's fast tokeniser and its PIL image processor are other classes,
                              SigLIP's towers lie one module deeper, its processor cannot crop, and
                              SigLIP 2 has no tokeniser of its own
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

# New name -> name in older versions.
OLDER_NAMES = {
    "all_gather_single": "all_gather_into_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor",
    "CLIPImageProcessorPil": "CLIPImageProcessor",
}
WORD_END = "</w>"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def renamed(owner: Any, name: str) -> Any:
    """Returns the attribute `name` of a module, under its older name where it has only that.

    Raises:
        AttributeError: the module has neither, so its version is not supported.
    """
    found = getattr(owner, name, None)
    return getattr(owner, OLDER_NAMES[name]) if found is None else found


def clip_image_processor() -> Any:
    """Returns the class of CLIP's image processor that uses PIL."""
    return renamed(transformers, "CLIPImageProcessorPil")


def siglip_processor_crops() -> bool:
    """True if SigLIP's processor can hold an image processor that crops, as the training does.

    In transformers 4 it takes SigLIP's own image processor only, which squeezes frames instead.
    """
    return not _is_transformers_4()


def siglip2_tokenizer_class() -> Any | None:
    """Returns the class of SigLIP 2's tokeniser, which lowers captions; None in transformers 4.

    There Gemma's class serves, and keeps rules that are added to it.
    """
    return getattr(transformers, "Siglip2Tokenizer", None)


def new_clip_tokenizer(
    vocabulary: Mapping[str, int] | None = None,
    merges: Sequence[tuple[str, str]] = (),
    **options: Any,
) -> Any:
    """Builds a tokeniser by CLIP's rules.

    Args:
        vocabulary: Token -> id; None: the special tokens only.
        merges: Pairs of tokens that are joined, the most frequent pair first.
        options: Further arguments of the tokeniser, such as `model_max_length`.
    """
    if _is_transformers_4():
        rules = _clip_rules(vocabulary or {CLIP_START: 0, CLIP_END: 1}, merges)
        return _class("CLIPTokenizerFast")(tokenizer_object=rules, **options)
    # transformers annotates list[str] but passes the merges to a class that takes pairs.
    given: Any = {"vocab": vocabulary and dict(vocabulary), "merges": list(merges)}
    return transformers.CLIPTokenizer(**given, **options)


def clip_tokenizer_class() -> Any:
    """Returns the class that loads CLIP's vocab.json and merges.txt and maps tokens to text."""
    return _class("CLIPTokenizerFast" if _is_transformers_4() else "CLIPTokenizer")


def _class(name: str) -> Any:
    """A class of transformers whose type stubs hold for one version only."""
    return getattr(transformers, name)


def bare_tower(tower: Any) -> Any:
    """Returns SigLIP's text or image tower as transformers 5 has it.

    In transformers 4 it is the only child of a module without weights of its own. Without that
    module, the weights have the same names in both versions, and each loads the other's
    checkpoints.
    """
    for name in ("text_model", "vision_model"):
        child = getattr(tower, name, None)
        if child is not None:
            return child
    return tower


def _is_transformers_4() -> bool:
    return int(transformers.__version__.split(".")[0]) < 5


def _clip_rules(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """The tokeniser that transformers 5 makes for CLIP; transformers 4 converts one from files."""
    model: Any = models.BPE(
        vocab=dict(vocabulary),
        merges=list(merges),
        continuing_subword_prefix="",
        end_of_word_suffix=WORD_END,
        fuse_unk=False,
        unk_token=CLIP_END,
    )
    rules: Any = Tokenizer(model)
    rules.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(CLIP_PIECES), behavior="removed", invert=True)
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    rules.decoder = decoders.ByteLevel()
    rules.post_processor = processors.RobertaProcessing(
        (CLIP_END, vocabulary[CLIP_END]),
        (CLIP_START, vocabulary[CLIP_START]),
        trim_offsets=False,
        add_prefix_space=False,
    )
    return rules
