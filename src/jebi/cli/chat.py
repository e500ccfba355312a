"""``jebi chat``: talk to a model in the terminal, answers streaming."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jebi.imports import uncollected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jebi.data.templates import Template
    from jebi.models.hf import JebiForCausalLM

HELP = "Type a question. /base and /tuned switch the adapter off and on, /quit ends."


def command(
    base: Annotated[
        str | None,
        typer.Option(help="smollm2, a folder, a .gguf file, or a hub id; by default the adapter's base, or smollm2."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder that a training wrote.")] = None,
    template: Annotated[str | None, typer.Option(help="tutorial, alpaca or a text; the training's by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut.", min=1)] = 256,
    load_in_4bit: Annotated[
        bool | None, typer.Option(help="Hold the model's weights in 4 bits; as in the training by default.")
    ] = None,
) -> None:
    """Ask a model questions; without an adapter a chat model is asked in its own chat form."""
    with uncollected():
        from jebi.adapters.peft_config import read_config
        from jebi.data.templates import CHAT, named
        from jebi.fast import FastLanguageModel
        from jebi.models.tokenizer import beside
        from jebi.run import base_for, model_settings, template_of

    # What is wrong with the call is said before a model is loaded.
    if adapter is not None:
        read_config(adapter)
    spec = template_of(adapter, template) if adapter is not None or template is not None else None
    settings = model_settings(adapter)
    if load_in_4bit is not None:
        settings |= {"load_in_4bit": load_in_4bit, "load_in_8bit": False}
    model, tokenizer = FastLanguageModel.from_pretrained(base_for(adapter, base), **settings)
    if adapter is not None:
        FastLanguageModel.put_adapter(model, adapter)
        tokenizer = beside(adapter, tokenizer, model)
    FastLanguageModel.for_inference(model)
    form = named(spec or (CHAT if tokenizer.chat_template else template_of(None, None)), tokenizer)
    typer.echo(HELP, err=True)
    tuned = True
    while (question := _ask()) not in (None, "/quit"):
        assert question is not None
        if question in ("/base", "/tuned"):
            tuned = question == "/tuned"
            typer.echo(f"Now the {question[1:]} model answers.", err=True)
        elif question.startswith("/"):
            typer.echo(HELP, err=True)
        elif question:
            _reply(model, tokenizer, form, question, max_new_tokens, tuned)


def _ask() -> str | None:
    """The next line, or None at the end of the input; the prompt is for people, and stdout for answers."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _reply(
    model: "JebiForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    form: "Template",
    question: str,
    max_new_tokens: int,
    tuned: bool,
) -> None:
    """Stream one answer to stdout; its speed to stderr."""
    import time
    from contextlib import nullcontext

    import torch
    from transformers import TextStreamer

    from jebi.data.conversation import question as asked
    from jebi.data.encoding import Encoder
    from jebi.inference.generation import generate

    prompts = Encoder(tokenizer, form.literals).prompts(form, [asked(question)])
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    began = time.perf_counter()
    with torch.no_grad(), nullcontext() if tuned else model.disable_adapter():
        output = generate(model, **inputs, streamer=streamer, max_new_tokens=max_new_tokens, do_sample=False)
    made = output.shape[1] - inputs["input_ids"].shape[1]
    typer.echo(f"[{made / (time.perf_counter() - began):.1f} tokens/s]", err=True)
