"""What tests share: tiny random Llama checkpoints, SmolLM2 in Hugging Face's layout, and the bar for rounding errors.

Both kinds of checkpoint are written by transformers, so that reading them proves something.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the network; libraries read this when they are imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from filelock import FileLock
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from jebi.models.hf import JebiForCausalLM

DATA = Path(__file__).resolve().parents[1] / ".testdata"

TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

VARIANTS: dict[str, dict[str, object]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "llama3": {
        # With 32 trained positions, heads of 16 have frequencies in all three of its ranges.
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "even": {"intermediate_size": 192},  # whose rows some formats can cut into blocks of 32
    "even untied": {"intermediate_size": 192, "tie_word_embeddings": False},
    "worded": {"vocab_size": 49152},  # with SmolLM2's tokenizer beside the weights
}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_llama(variant)``: a folder with a random float32 Llama, one of `VARIANTS`; not to be written to."""
    made: dict[str, Path] = {}

    def folder_of(variant: str = "tied") -> Path:
        if variant not in made:
            folder = tmp_path_factory.mktemp(f"llama-{variant}")
            write_tiny(folder, VARIANTS[variant])
            if variant == "worded":
                from jebi.models.files import find

                find("smollm2").tokenizer().save_pretrained(folder)
            made[variant] = folder
        return made[variant]

    return folder_of


@pytest.fixture(scope="session")
def load() -> Callable[..., "JebiForCausalLM"]:
    """``load(folder, dtype, load_in_4bit, load_in_8bit)``: jebi's model of a checkpoint on the CPU; dense float32."""
    from jebi.config import ModelConfig
    from jebi.models.files import find
    from jebi.models.loading import load_model

    def load(
        folder: Path, dtype: torch.dtype = torch.float32, load_in_4bit: bool = False, load_in_8bit: bool = False
    ) -> "JebiForCausalLM":
        files = find(str(folder))
        storage = ModelConfig(load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit).storage
        return load_model(files, files.config(), dtype, torch.device("cpu"), storage)

    return load


def write_tiny(folder: Path, changes: dict[str, object]) -> None:
    """Write a tiny Llama whose activations stay of order 1, with norms and biases that are not 1 and 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**TINY | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(drawn * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.1 * drawn + (0.0 if name.endswith("bias") else 1.0))
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2 as transformers itself converts the .gguf file: float32, with its tokenizer. Made once, then kept."""
    target = DATA / "smollm2-hf"
    DATA.mkdir(exist_ok=True)
    with FileLock(DATA / "smollm2-hf.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=DATA, prefix="smollm2-hf-", ignore_cleanup_errors=True) as scratch:
                partial = Path(scratch) / "whole"
                convert_smollm2(partial)
                partial.replace(target)
    return target


def convert_smollm2(folder: Path) -> None:
    """Let transformers read the embedded .gguf file and write it as a folder; takes about 17 s."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from jebi.models.files import embedded_file

    source = embedded_file()
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # With these it would be saved as a quantised model.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


@pytest.fixture(scope="session")
def at_most_twice() -> Callable[[str, Tensor, Tensor, Tensor], None]:
    """``at_most_twice(name, ours, plain, exact)``: the one bar for rounding errors.

    ``ours`` may be at most twice as far from the float64 result as plain torch at the same dtype, by root mean
    square. Where plain torch happens to be nearer than a single rounding of the result to its dtype, that is granted.
    """

    def check(name: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
        assert ours.shape == plain.shape == exact.shape, name
        assert ours.dtype == plain.dtype, name
        own, other = (rms(value.double() - exact) for value in (ours, plain))
        one_rounding = torch.finfo(plain.dtype).eps / 2 * rms(exact)
        assert own <= 2 * max(other, one_rounding), f"{name}: error {own:.3g}, plain torch {other:.3g}"

    return check


def rms(values: Tensor) -> float:
    """Root mean square."""
    return math.sqrt(values.double().square().mean().item())


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and `torch.empty_like` hand out NaN, so that a value nobody writes shows."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: object, **kwargs: object) -> Tensor:
        tensor = make(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() and not tensor.is_meta else tensor

    return made


@pytest.fixture(scope="session")
def byte_tokenizer() -> "Callable[[bool], PreTrainedTokenizerFast]":
    """``byte_tokenizer(adds_bos)``: one token a byte, so that lengths are known, and <pad>, <s>, </s> as 0, 1, 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(adds_bos: bool = False) -> PreTrainedTokenizerFast:
        special = ["<pad>", "<s>", "</s>"]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate([*special, *alphabet])}, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens(special)
        if adds_bos:
            inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=inner,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            clean_up_tokenization_spaces=False,
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(byte_tokenizer: "Callable[[bool], PreTrainedTokenizerFast]") -> "PreTrainedTokenizerFast":
    """One token a byte, an EOS that is not the pad token, and no BOS added."""
    return byte_tokenizer(False)


@pytest.fixture(scope="session")
def tiny_folder(
    tiny_llama: Callable[[str], Path], tokenizer: "PreTrainedTokenizerFast", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny checkpoint with the byte tokenizer beside it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    shutil.copytree(tiny_llama("tied"), folder)
    tokenizer.save_pretrained(folder)
    return folder
