"""A tokenizer that tests make themselves: bytes, and four special tokens."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def make_tokenizer(adds: str = "$A") -> PreTrainedTokenizerFast:
    """Make a tokenizer of bytes that merges `ab`, and adds special tokens as `adds` says."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "ab"])}
    bpe = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    special = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    numbers = [(token, bpe.token_to_id(token)) for token in ("<s>", "</s>")]
    bpe.post_processor = processors.TemplateProcessing(single=adds, special_tokens=numbers)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
