"""``config``: a run is read from YAML and ``--set`` with types checked, and every mistake names its setting."""

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from jebi.config import (
    TARGET_MODULES,
    DataConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    check_type,
    read_run,
    run_from_dict,
    settings,
)
from jebi.config.train_section import names, require_names
from jebi.errors import ConfigError

RUN = """
model: {name: smollm2, max_seq_length: 512}
lora: {r: 8}
data: {train: rows.jsonl}
train: {learning_rate: 2e-4, max_steps: 3}
"""

FIELDS = {
    ModelConfig: [
        "name",
        "max_seq_length",
        "load_in_4bit",
        "load_in_8bit",
        "full_finetuning",
        "dtype",
        "token",
        "rope_scaling",
        *("embedding", "head"),
        "compute",
        "shard",
    ],
    LoraConfig: [
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
        "loftq_config",
        "modules_to_save",
        "random_state",
    ],
    DataConfig: [
        "train",
        "split",
        "heldout",
        "heldout_share",
        "streaming",
        "shuffle_buffer",
        "format",
        "formatter",
        "roles",
        "bad_rows",
        "template",
        "text_field",
        "learn",
        "special_tokens_in_text",
        "packing",
        *("long", "overlap", "repair_encoding", "allow"),
    ],
    RunConfig: ["model", "lora", "data", "train"],
}
"""The settings there are. One that is added, renamed or dropped changes users' files: it is to be noticed."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(RUN, encoding="utf-8")
    return tmp_path / "run.yaml"


def test_the_list_of_settings_is_frozen() -> None:
    assert {cls: [field.name for field in dataclasses.fields(cls)] for cls in FIELDS} == FIELDS


def test_every_field_has_a_docstring() -> None:
    tree = ast.parse(inspect.getsource(settings))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")]
    assert {node.name for node in classes} == {cls.__name__ for cls in FIELDS}
    for node in classes:
        for statement, following in zip(node.body, [*node.body[1:], None]):
            if isinstance(statement, ast.AnnAssign):
                said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert said, f"{node.name}.{ast.unparse(statement.target)}"


def test_a_file_is_read_over_the_defaults(path: Path) -> None:
    run = read_run(path)
    assert run.model == ModelConfig("smollm2", 512)
    assert run.lora == LoraConfig(r=8, target_modules=list(TARGET_MODULES))
    assert run.data == DataConfig("rows.jsonl")
    assert run.train == {"learning_rate": 0.0002, "max_steps": 3}


def test_a_run_survives_being_written_and_read(path: Path) -> None:
    run = read_run(path, ["lora.lora_alpha=32", "model.dtype=bfloat16", "data.heldout_share=0.1"])
    assert run_from_dict(dataclasses.asdict(run)) == run


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lora.r=32", 32),
        ("lora.lora_alpha=32", 32.0),
        ("lora.lora_alpha=1.5e1", 15.0),
        ("lora.lora_dropout=5e-2", 0.05),
        ("lora.use_rslora=true", True),
        ("lora.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("model.name=some/folder", "some/folder"),
        ("model.dtype=null", None),
        ("model.load_in_4bit=false", False),
        ('data.template="{instruction}={output}"', "{instruction}={output}"),
        ("data.heldout=a=b.jsonl", "a=b.jsonl"),
    ],
)
def test_settings_are_typed_as_in_the_file(setting: str, value: Any, path: Path) -> None:
    section, name = setting.partition("=")[0].split(".")
    read = getattr(getattr(read_run(path, [setting]), section), name)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(("text", "value"), [("2e-4", 2e-4), ("-1E+3", -1000.0), ("1_0e2", 1000.0), ("e5", "e5")])
def test_numbers_are_written_as_everywhere(text: str, value: Any, path: Path) -> None:
    assert read_run(path, [f"train.learning_rate={text}"]).train["learning_rate"] == value


def test_the_last_setting_wins_and_a_new_section_may_begin_with_one(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {train: rows.jsonl}\n")
    run = read_run(tmp_path / "run.yaml", ["lora.r=2", "lora.r=3", "train.max_steps=1"])
    assert (run.lora.r, run.train) == (3, {"max_steps": 1})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora.rank=3", r"setting 'lora.rank' is unknown"),
        ("lora.lora_alfa=3", r"setting 'lora.lora_alfa' is unknown. Did you mean 'lora.lora_alpha'\?"),
        ("model.max_seq_len=9", r"Did you mean 'model.max_seq_length'\?"),
        ("modl.name=x", r"setting 'modl' is unknown. Did you mean 'model'\?"),
        ("lora.zzz=1", r"setting 'lora.zzz' is unknown. Known: alpha_pattern, bias, .*use_rslora\."),
        ("lora.r=3.5", r"lora.r must be int, not 3.5"),
        ("lora.r=true", r"lora.r must be int, not True"),
        ("lora.r=many", r"lora.r must be int, not 'many'"),
        ("lora.lora_alpha=yes", r"lora.lora_alpha must be float, not True"),
        ("lora.bias=some", r"lora.bias must be one of none, all, lora_only, not 'some'"),
        ("model.load_in_4bit=4", r"model.load_in_4bit must be bool or null, not 4"),
        ("model.dtype=16", r"model.dtype must be str or null, not 16"),
        ("model.dtype=int8", r"dtype must be float32, bfloat16, float16 or null, not 'int8'"),
        ("model.embedding=nf4", r"model.embedding must be one of auto, card, host, not 'nf4'"),
        ("model.head=disk", r"model.head must be one of auto, card, host, int8, nf4, not 'disk'"),
        ("model.max_seq_length=0", r"max_seq_length must be at least 1, not 0"),
        ("lora.target_modules=3", r"lora.target_modules must be list or str, not 3"),
        ("lora.target_modules='(q_proj'", r"target_modules '\(q_proj' is no regular expression: missing \)"),
        ("lora.exclude_modules='*'", r"exclude_modules '\*' is no regular expression"),
        ("lora.layers_pattern=layers", r"layers_pattern does nothing without layers_to_transform"),
        ("lora.rank_pattern={q_proj: 0}", r"rank_pattern: 'q_proj' must have a whole number above 0, not 0"),
        ("lora.alpha_pattern={q_proj: -1}", r"alpha_pattern: 'q_proj' must have a number above 0, not -1"),
        ("lora.init_lora_weights=olora", r"init_lora_weights must be True, 'gaussian', .* not 'olora'"),
        ("lora.init_lora_weights=false", r"init_lora_weights must be True, .* not False"),
        ("lora.init_lora_weights=pissa_niter_0", r"init_lora_weights must be True, .* not 'pissa_niter_0'"),
        ("lora.loftq_config={loftq_bits: 8}", r"loftq_bits must be 4, not 8"),
        ("lora.loftq_config={loftq_iter: 0}", r"loftq_iter must be a whole number above 0, not 0"),
        (
            "lora.loftq_config={bits: 4}",
            r"setting 'loftq_config.bits' is unknown. Known: loftq_bits, loftq_iter",
        ),
        ("lora.target_modules=[]", r"target_modules is empty; name at least one of q_proj"),
        ("lora.lora_dropout=1", r"lora_dropout must be from 0 to below 1, not 1.0"),
        ("lora.lora_alpha=0", r"lora_alpha must be a number above 0, not 0.0"),
        ("lora.lora_alpha=.nan", r"lora_alpha must be a number above 0, not nan"),
        ("lora.r=0", r"r must be a whole number above 0, not 0"),
        ("data.heldout_share=1", r"data.heldout_share must be from 0 to below 1"),
        ("data.learn=some", r"data.learn must be one of auto, all, answers, last_answer, not 'some'"),
        ("data.train=", r"data.train must be str or list, not None"),
        ("lora", r"--set 'lora' must be section.key=value, such as --set lora.r=32"),
        ("lora=3", r"--set 'lora=3' must be section.key=value"),
        ("lora.r", r"--set 'lora.r' must be section.key=value"),
        ("lora.r=[1", r"--set 'lora.r=\[1': the value is not YAML"),
    ],
)
def test_a_mistake_names_the_setting(setting: str, message: str, path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_run(path, [setting])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold sections: model, lora, data, train"),
        (b"- a\n- b\n", "must hold sections"),
        (b"data: {train: a.jsonl\n", "run.yaml' is not YAML: .*line 2"),
        (b"data: \xff\xfe\n", "run.yaml' is not YAML"),
        (b"data: rows.jsonl\n", "section 'data' must hold settings, one a line"),
        (b"data: {train: a.jsonl}\ntrain: [1]\n", "section 'train' must hold settings"),
        (b"model: {name: smollm2}\n", "data.train is missing: name a .jsonl file or a hub data set"),
    ],
)
def test_a_file_that_is_no_run_is_explained(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_run(tmp_path / "run.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config '.*run.yaml' cannot be read: No such file or directory"):
        read_run(tmp_path / "run.yaml")


def test_a_setting_into_a_section_that_is_a_value_is_explained(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: rows.jsonl\n")
    with pytest.raises(ConfigError, match=r"--set 'data.packing=true': section 'data' holds no settings"):
        read_run(tmp_path / "run.yaml", ["data.packing=true"])


@pytest.mark.parametrize(("rslora", "scale"), [(False, 0.5), (True, 2.0)])
def test_the_scale_of_an_adapter(rslora: bool, scale: float) -> None:
    assert LoraConfig(r=16, lora_alpha=8, use_rslora=rslora).scale_of("model.layers.0.self_attn.q_proj") == scale


def test_ranks_and_scales_of_some_projections() -> None:
    patterns = {"rank_pattern": {"q_proj": 2, r"1\..*_proj": 4}, "alpha_pattern": {"self_attn.o_proj": 32}}
    config = LoraConfig(r=8, lora_alpha=8, **patterns)
    ranks = {
        path: config.rank_of(path) for path in ("layers.0.q_proj", "layers.1.up_proj", "layers.1.q_proj", "o_proj")
    }
    assert ranks == {"layers.0.q_proj": 2, "layers.1.up_proj": 4, "layers.1.q_proj": 2, "o_proj": 8}
    assert config.scale_of("layers.0.self_attn.o_proj") == 4
    assert config.scale_of("layers.0.self_attn.q_proj") == 4


def test_loftq_is_asked_for_in_either_way() -> None:
    full = {"loftq_bits": 4, "loftq_iter": 1}
    for asked in ({"init_lora_weights": "loftq"}, {"loftq_config": {"loftq_bits": 4}}, {"loftq_config": full}):
        config = LoraConfig(**asked)
        assert (config.init_lora_weights, config.loftq_config) == ("loftq", full)
    with pytest.raises(ConfigError, match="loftq_config does nothing with init_lora_weights='pissa'"):
        LoraConfig(init_lora_weights="pissa", loftq_config=full)
    with pytest.raises(ConfigError, match="layers_to_transform needs names in target_modules"):
        LoraConfig(target_modules=".*q_proj", layers_to_transform=[0])


@pytest.mark.parametrize(
    ("hint", "value", "right"),
    [
        (int, 3, True),
        (int, 3.0, False),
        (float, 3, True),
        (float | None, None, True),
        (float | None, "3", False),
        (str, 3, False),
        (bool, 1, False),
        (dict[str, Any] | str | None, {"a": 1}, True),
        (dict[str, Any] | str | None, 3, False),
        (Any, object(), True),
    ],
)
def test_the_trainers_settings_are_typed_by_their_hints(hint: Any, value: Any, right: bool) -> None:
    if right:
        check_type(hint, value, "train.x")
    else:
        with pytest.raises(ConfigError, match=r"train\.x must be "):
            check_type(hint, value, "train.x")


def test_a_template_beside_ready_texts_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.template does nothing beside data.text_field"):
        read_run(path, ["data.template=alpaca", "data.text_field=text"])


def test_answers_alone_are_learnt_only_where_they_are_known_apart(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.learn 'answers' needs the answers apart: use a template"):
        read_run(path, ["data.learn=answers", "data.text_field=text"])


def test_an_adapter_and_all_weights_exclude_each_other() -> None:
    document = {"data": {"train": "rows.jsonl"}, "model": {"full_finetuning": True}}
    assert run_from_dict(document).model.full_finetuning
    with pytest.raises(ConfigError, match=r"model.full_finetuning trains .* drop it or section 'lora'"):
        run_from_dict(document | {"lora": {"r": 32}})


def test_the_names_of_section_train_are_read_off_without_an_import() -> None:
    """As `jebi plan` knows them, and as `jebi train` does."""
    from jebi.training.arguments import SFTConfig

    assert names() == {field.name for field in dataclasses.fields(SFTConfig) if field.init}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("learning_rat", r"setting 'train.learning_rat' is unknown. Did you mean 'train.learning_rate'\?"),
        ("long", r"train.long: set data.long instead"),
    ],
)
def test_names_of_section_train_that_mean_nothing_there_are_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        require_names({name: 1}, names())
