"""`train_on_responses_only`, as Unsloth's scripts call it: the answers alone are learnt from now on."""

from dataclasses import replace

from jebi.data.responses import ResponseParts
from jebi.data.rows import columns_of
from jebi.errors import ConfigError
from jebi.training.trainer import SFTTrainer


def train_on_responses_only(
    trainer: SFTTrainer,
    instruction_part: str | None = None,
    response_part: str | None = None,
) -> SFTTrainer:
    """Prepare the trainer's rows again so that only answers, each with its end-of-turn token, have labels.

    Rows whose turns are there (``messages``, ``conversations``, Alpaca's columns, prompt and completion) are rendered
    turn by turn and need no parts; parts that are given are checked against what was found. Of ready texts made of such
    columns the same holds where the template makes the same text of them. Other ready texts are cut at the parts.

    Args:
        trainer: whose rows to prepare again, in place.
        instruction_part: what stands before a question, such as ``<|im_start|>user\\n``.
        response_part: what stands before an answer, such as ``<|im_start|>assistant\\n``.

    Raises:
        ConfigError: the rows are ready texts and no parts were given, or the rows are tokens already.
        DataError: an answer is not where the parts say.
    """
    if (instruction_part is None) != (response_part is None):
        raise ConfigError("give instruction_part and response_part both, or neither.")
    parts = None
    if instruction_part is not None and response_part is not None:
        parts = ResponseParts(instruction_part, response_part)
    for given in trainer.given:
        for rows in given.values() if isinstance(given, dict) else [given]:
            if rows is not None and "input_ids" in columns_of(rows):
                raise ConfigError("the rows were given as token ids: their labels say what is learnt, so change those.")
    prepare = replace(trainer.prepare, how=replace(trainer.prepare.how, learn="answers", parts=parts))
    trainer.train_dataset, trainer.eval_dataset = (prepare(given) for given in trainer.given)
    trainer.prepare = prepare
    return trainer
