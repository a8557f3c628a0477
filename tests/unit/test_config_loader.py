"""The strict YAML loader: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from megarlhf.config.loader import ConfigError, check_config, describe, dump_yaml, load_config, to_dict


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is spread over the ranks."""

    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1

    def violations(self) -> list[str]:
        return [f"{axis} must be at least 1, got {size}" for axis, size in (("tp", self.tp), ("pp", self.pp)) if size < 1]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Adam."""

    lr: float
    """Peak learning rate,
    per step."""
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["constant", "cosine", 10] = "cosine"
    warmup_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    layout: Layout = Layout()
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=9e-6, warmup_steps=10))
    checkpoint: Path | None = None
    name: str = "gpt2"


@dataclass(frozen=True, kw_only=True)
class Source:
    path: Path
    weight: float = 1.0

    def violations(self) -> list[str]:
        return [] if self.weight > 0 else [f"weight must be positive, got {self.weight}"]


@dataclass(frozen=True, kw_only=True)
class Ema:
    decay: float = 0.992


@dataclass(frozen=True, kw_only=True)
class Run:
    policy: Model
    """The model that is trained."""
    value: Model = Model()
    sources: tuple[Source, ...] = ()
    stop: tuple[str, ...] = ()
    ema: Ema | None = None
    kl_coef: float = 0.02
    resume: bool = False
    seed: int = 0

    def violations(self) -> list[str]:
        return [] if self.policy.layout.tp == self.value.layout.tp else ["policy.layout.tp must equal value.layout.tp"]


@pytest.fixture
def load(tmp_path):
    """Load a Run from YAML text."""

    def load(text: str, *overrides: str) -> Run:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(Run, path, overrides)

    return load


@pytest.fixture
def refused(load, tmp_path):
    """The lines of the ConfigError that YAML text leads to, with the folder cut off."""

    def refused(text: str, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as error:
            load(text, *overrides)
        return str(error.value).replace(f"{tmp_path}/", "").splitlines()

    return refused


def test_every_type_is_read(load):
    text = """
policy:
  layout: {tp: 2}
  optimizer: {lr: 1e-5, betas: [0, .999], schedule: 10, warmup_steps: 3}
  checkpoint: a/b
value: {layout: {tp: 2}}
sources: [{path: x}, {path: y, weight: 2}]
stop: ["1", off, 12:30:00, 2022-03-04, 010]
ema: {}
resume: true
seed: 256_000
"""
    config = load(text)
    assert config == Run(
        policy=Model(
            layout=Layout(tp=2),
            optimizer=Optimizer(lr=1e-5, betas=(0.0, 0.999), schedule=10, warmup_steps=3),
            checkpoint=Path("a/b"),
        ),
        value=Model(layout=Layout(tp=2)),
        sources=(Source(path=Path("x")), Source(path=Path("y"), weight=2.0)),
        stop=("1", "off", "12:30:00", "2022-03-04", "010"),
        ema=Ema(),
        resume=True,
        seed=256_000,
    )
    assert type(config.policy.optimizer.betas[0]) is float


def test_a_section_completes_from_the_fields_default(load):
    assert load("policy: {optimizer: {schedule: constant}}").policy.optimizer == Optimizer(lr=9e-6, schedule="constant", warmup_steps=10)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("policy: {layuot: {tp: 2}}", 'policy.layuot: unknown key (given {"tp": 2}); did you mean policy.layout?'),
        ("policy: {}\ndecay: 0.9", "decay: unknown key (given 0.9); did you mean ema.decay?"),
        ("policy: {}\nema: {qqq: 0}", "ema.qqq: unknown key (given 0); known here: decay"),
        ("policy: {}\n3: 1", "3: unknown key (given 1); known here: policy, value, sources, stop, ema, kl_coef, resume, seed"),
        ("policy:", "policy: expected section, got null"),
        ("seed: 1", "policy: missing, expected section"),
        ("policy: {}\nsources: [{path: a}, {weight: 2}]", "sources[1].path: missing, expected path"),
        ("policy: {}\nsources: {path: a}", 'sources: expected list of {path, weight}, got {"path": "a"}'),
        ("policy: {}\nseed: true", "seed: expected int, got true"),
        ("policy: {}\nseed: 1.0", "seed: expected int, got 1.0"),
        ("policy: {}\nresume: 1", "resume: expected bool, got 1"),
        ("policy: {}\nkl_coef: fast", 'kl_coef: expected float, got "fast"'),
        ("policy: {}\nkl_coef: .nan", "kl_coef must be a finite number, got nan"),
        ("policy: {}\nkl_coef: -.inf", "kl_coef must be a finite number, got -inf"),
        ("policy: {optimizer: {betas: [0, .inf]}}", "policy.optimizer.betas[1] must be a finite number, got inf"),
        ("policy: {}\nkl_coef: false", "kl_coef: expected float, got false"),
        ("policy: {name: 7}", "policy.name: expected str, got 7; put it in quotes to make it a string"),
        ("policy: {checkpoint: 7}", "policy.checkpoint: expected path or null, got 7"),
        ("policy: {optimizer: {betas: [1]}}", "policy.optimizer.betas: expected list [float, float], got [1]"),
        ("policy: {}\nstop: [a, null]", "stop[1]: expected str, got null; fill it in"),
        ("policy: {}\nkl_coef:", "kl_coef: expected float, got null; fill it in, or leave the key out, which gives 0.02"),
        (
            "policy: {optimizer: {schedule: cosin}}",
            'policy.optimizer.schedule: expected "constant" | "cosine" | 10, got "cosin"; did you mean "cosine"?',
        ),
    ],
)
def test_one_mistake_is_named(refused, text, line):
    assert refused(text) == [f"run.yaml: {line}"]


def test_all_mistakes_are_listed_with_the_rules_of_the_parts_that_could_be_built(refused):
    lines = refused(
        "policy: {layout: {tp: 0, pp: -1}, nmae: x}\nvalue: {layout: {tp: 2}}\nsources: [{path: a, weight: 0}, {path: 1}]\nseed: x",
        "resume=7",
        "ema.decay=high",
        "kl_coef",
        "stop=[",
    )
    assert lines[:2] == [
        "command line: 'kl_coef' is not of the form section.key=value",
        "command line: 'stop=[', line 1, column 2: broken YAML: expected the node content, but found '<stream end>'",
    ]
    assert sorted(lines[2:]) == sorted(
        [
            'run.yaml: policy.nmae: unknown key (given "x"); did you mean policy.name?',
            "run.yaml: sources[1].path: expected path, got 1",
            'run.yaml: seed: expected int, got "x"',
            "command line: resume: expected bool, got 7",
            'command line: ema.decay: expected float, got "high"',
            "run.yaml with overrides: policy.layout.tp must be at least 1, got 0",
            "run.yaml with overrides: policy.layout.pp must be at least 1, got -1",
            "run.yaml with overrides: sources[0].weight must be positive, got 0.0",
        ]
    )


def test_rules_across_sections_join_the_rules_of_sections(refused):
    assert refused("policy: {layout: {tp: 0}}") == [
        "run.yaml: policy.layout.tp must be at least 1, got 0",
        "run.yaml: policy.layout.tp must equal value.layout.tp",
    ]


def test_overrides(load, refused):
    text = "policy: &model {layout: {tp: 2}}\nvalue: *model\nseed: 1"
    config = load(text, "seed=7", "policy.layout.pp=4", "ema.decay=1e-1", "stop=[a, b]", "policy.checkpoint=x=y")
    assert (config.seed, config.stop, config.ema) == (7, ("a", "b"), Ema(decay=0.1))
    assert config.policy.layout == Layout(tp=2, pp=4)
    assert config.value.layout == Layout(tp=2), "sections shared by a YAML alias must not change together"
    assert config.policy.checkpoint == Path("x=y")
    assert load("policy: {}\nema: {decay: 0.5}", "ema=null").ema is None
    assert load("policy: {}\nema: null", "ema.decay=0.5").ema == Ema(decay=0.5)
    assert load_config(Run, None, ["policy={}"]) == Run(policy=Model())
    assert refused("policy: {}", "policy.layuot.tp=2") == [
        'command line: policy.layuot: unknown key (given {"tp": 2}); did you mean policy.layout?'
    ]


def test_broken_files(refused, tmp_path):
    assert refused("policy:\n  layout: {tp: 1\nseed: 2")[0].startswith("run.yaml, line 3, column 5: broken YAML: ")
    assert refused("policy: {}\nseed: 1\nseed: 2") == ["run.yaml, line 3, column 1: broken YAML: the key 'seed' is given twice"]
    assert refused("policy: !!python/object:os.system {}")[0].startswith("run.yaml, line 1, column 9: broken YAML: could not determine")
    assert refused("[1, 2]") == ["run.yaml: expected keys and values, got [1, 2]"]
    assert refused("") == ["run.yaml: policy: missing, expected section"]
    with pytest.raises(ConfigError, match=r"none\.yaml: there is no such file"):
        load_config(Run, tmp_path / "none.yaml")


def test_dumped_yaml_reads_back_equal(load):
    awkward = "1e-5 1.5E3 off null ~ 010 1_0 .5 1. 1.e3 .inf 12:30:00 2022-03-04 << = # true {} 0x1F".split()
    awkward = (*awkward, "", "a: b", " x\n\ty ", "\u00e9\u2028")
    config = Run(
        policy=Model(optimizer=Optimizer(lr=1e-7, betas=(1 / 3, 1e300)), checkpoint=Path("1e5"), name="on"),
        sources=(Source(path=Path("/data/x y"), weight=1e22),),
        stop=awkward,
        ema=Ema(),
    )
    assert load(dump_yaml(config)) == config
    assert load(dump_yaml(Run(policy=Model()))) == Run(policy=Model())
    assert to_dict(config) == yaml.safe_load(dump_yaml(config)), "stock YAML readers must see the same values"


def test_configs_built_in_code_are_held_to_types_and_rules():
    check_config(Run(policy=Model()))
    with pytest.raises(ConfigError) as error:
        check_config(Run(policy=Model(layout=Layout(tp=0), name=3), seed=True))
    assert str(error.value).splitlines() == [
        "configuration: policy.name: expected str, got 3; put it in quotes to make it a string",
        "configuration: policy.layout.tp must be at least 1, got 0",
        "configuration: seed: expected int, got true",
    ]


def test_describe_lists_every_field_with_its_docstring():
    text = describe(Run)
    assert text.startswith("policy: section, required\n    The model that is trained.\npolicy.layout: section, defaults below\n")
    assert "policy.layout.tp: int, default 1\n    Tensor-parallel size.\n" in text
    assert "value.optimizer: section, defaults below\n    Adam.\nvalue.optimizer.lr: float, default 9e-06\n" in text
    assert "value.optimizer.lr: float, default 9e-06\n    Peak learning rate, per step.\n" in text
    assert "policy.optimizer.betas: list [float, float], default [0.9, 0.95]\n" in text
    assert "policy.checkpoint: path or null, default null\n" in text
    assert "sources: list of {path, weight}, default []\n" in text
    assert "sources[].path: path, required\n" in text
    assert "value: section, defaults below\nvalue.layout:" in text, "a class without a docstring must not show its signature"
    assert "ema: section or null, default null\n" in text
    assert "ema.decay: float, default 0.992\n" in text
