"""``jebi chat``: talk to a model in the terminal, answers streaming."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jebi.data.templates import Template
    from jebi.models.hf import JebiForCausalLM

HELP = "Type a question. /base and /tuned switch the adapter off and on, /quit ends."


def command(
    base: Annotated[str, typer.Option(help="The model: smollm2, a folder, a .gguf file, or a hub id.")] = "smollm2",
    adapter: Annotated[Path | None, typer.Option(help="Folder that a training wrote.")] = None,
    template: Annotated[str | None, typer.Option(help="tutorial, alpaca or a text; the training's by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut.", min=1)] = 256,
    load_in_4bit: Annotated[bool, typer.Option(help="Hold the model's weights in 4 bits.")] = True,
) -> None:
    """Ask a model questions; without an adapter a chat model is asked in its own chat form."""
    from jebi.fast import FastLanguageModel
    from jebi.run import template_of

    model, tokenizer = FastLanguageModel.from_pretrained(base, load_in_4bit=load_in_4bit)
    if adapter is not None:
        FastLanguageModel.put_adapter(model, adapter)
    FastLanguageModel.for_inference(model)
    own_form = adapter is None and template is None and tokenizer.chat_template is not None
    form = None if own_form else template_of(adapter, template)
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
    """The next line, or None at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return None


def _reply(
    model: "JebiForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    form: "Template | None",
    question: str,
    max_new_tokens: int,
    tuned: bool,
) -> None:
    """Stream one answer to stdout; its speed to stderr."""
    import time
    from contextlib import nullcontext

    import torch
    from transformers import TextStreamer

    from jebi.inference.generation import generate

    prompt = form.prompt(question) if form is not None else _chat_form(tokenizer, question)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=form is not None).to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    began = time.perf_counter()
    with torch.no_grad(), nullcontext() if tuned else model.disable_adapter():
        output = generate(model, **inputs, streamer=streamer, max_new_tokens=max_new_tokens, do_sample=False)
    made = output.shape[1] - inputs["input_ids"].shape[1]
    typer.echo(f"[{made / (time.perf_counter() - began):.1f} tokens/s]", err=True)


def _chat_form(tokenizer: "PreTrainedTokenizerBase", question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
