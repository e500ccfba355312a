"""``jebi chat``: talk to a model in the terminal, answers streaming."""

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from jebi.imports import uncollected

HELP = (
    "Type a question. /base and /tuned switch the adapter off and on, /new forgets what was said, /quit ends; "
    "Ctrl-C cuts an answer off."
)


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
        from jebi.data.templates import CHAT, check, named
        from jebi.errors import DataError
        from jebi.fast import FastLanguageModel
        from jebi.inference.talk import Talk
        from jebi.models.tokenizer import beside
        from jebi.run import base_for, model_settings, template_of

    # What is wrong with the call is said before a model is loaded.
    if adapter is not None:
        read_config(adapter)
    spec = template_of(adapter, template) if adapter is not None or template is not None else None
    if spec is not None:
        check(spec)
    settings = model_settings(adapter)
    if load_in_4bit is not None:
        settings |= {"load_in_4bit": load_in_4bit, "load_in_8bit": False}
    model, tokenizer = FastLanguageModel.from_pretrained(base_for(adapter, base), **settings)
    if adapter is not None:
        FastLanguageModel.put_adapter(model, adapter)
        tokenizer = beside(adapter, tokenizer, model)
    FastLanguageModel.for_inference(model)
    form = named(spec or (CHAT if tokenizer.chat_template else template_of(None, None)), tokenizer)
    talk, tuned = Talk(model, tokenizer, form, max_new_tokens), True
    typer.echo(HELP, err=True)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # or what follows a line that is no text would be lost with it
    while (question := _ask()) not in (None, "/quit"):
        assert question is not None
        if question in ("/base", "/tuned") and adapter is None:
            typer.echo("There is no adapter to switch: name one with --adapter.", err=True)
        elif question in ("/base", "/tuned"):
            tuned = question == "/tuned"
            typer.echo(f"Now the {question[1:]} model answers.", err=True)
        elif question == "/new":
            talk.forget()
            typer.echo("Forgotten.", err=True)
        elif question.startswith("/"):
            typer.echo(HELP if question == "/help" else f"There is no {question.split()[0]}. {HELP}", err=True)
        elif question:
            try:
                said = talk.ask(question, tuned)
            except KeyboardInterrupt:
                typer.echo("\n[cut off and forgotten]", err=True)
            except DataError as error:
                typer.echo(f"[{error}]", err=True)
            else:
                speed = f"[first token after {said.first_s:.2f} s, then {said.tokens_per_s:.1f} tokens/s]"
                typer.echo(speed, err=True)


def _ask() -> str | None:
    """The next line, or None at the end of the input; the prompt is for people, and stdout for answers."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
        line.encode()  # Bytes that are no text may be carried in it.
    except UnicodeError:
        typer.echo("That line is not UTF-8: set the terminal, or save the file, as UTF-8.", err=True)
        return ""
    except (EOFError, KeyboardInterrupt):
        return None
    return line
