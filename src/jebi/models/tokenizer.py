"""A loaded tokenizer made ready for training and batched answers."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from jebi.models.files import read_tokenizer
from jebi.models.hf import JebiForCausalLM

_PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<pad>", "[PAD]", "<unk>")


def ready(tokenizer: PreTrainedTokenizerBase, model: JebiForCausalLM) -> PreTrainedTokenizerBase:
    """Give it a padding token, pad on the left (answers start at the right), and tell the model its ids.

    Training never pads, so a padding token equal to EOS does no harm to it.
    """
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((t for t in _PAD_CANDIDATES if t in vocabulary), tokenizer.eos_token)
    tokenizer.padding_side = "left"
    settings = model.generation_config
    model.config.pad_token_id = settings.pad_token_id = tokenizer.pad_token_id
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    return tokenizer


def beside(adapter: Path | None, otherwise: PreTrainedTokenizerBase, model: JebiForCausalLM) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside an adapter, which may know more tokens than the base's, or the base's."""
    if adapter is None or not (adapter / "tokenizer_config.json").is_file():
        return otherwise
    return ready(read_tokenizer(adapter), model)
