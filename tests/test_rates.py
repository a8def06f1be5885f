"""What a model may take, and the recipe file: targets against sizes, text there and back, what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from small import small_request

from eightfold.format import BITS, QuantConfig, stored_bits
from eightfold.preflight import Plan, make_plan, output_bytes
from eightfold.rates import GroupLosses, Target, load_recipe, nominal_bits, read_recipe, recipe_text, with_rates


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds that need no measuring: it takes half a second a plan."""
    monkeypatch.setattr("eightfold.preflight._rates", lambda device, bits: (1e9, 1e6))


@pytest.fixture
def plan(model_folder, tmp_path: Path) -> Plan:
    return make_plan(small_request(model_folder("llama"), tmp_path / "out", shard_bytes=100_000))


def losses(config: QuantConfig, seed: int = 0) -> list[GroupLosses]:
    """Of groups as Llama has them, drawn at random."""
    rng = random.Random(seed)
    found = []
    for i in range(3):
        for part, names in (("self_attn", "qkv"), ("self_attn", "o"), ("mlp", ("gate", "up")), ("mlp", ("down",))):
            linears = tuple(f"model.layers.{i}.{part}.{name}_proj" for name in names)
            assert set(linears) <= set(config.layers)
            weight = 10 ** rng.uniform(-2, 0)
            found.append(GroupLosses(linears, {bits: weight * 3.4**-bits for bits in BITS}))
    return found


def size_of(plan: Plan, config: QuantConfig) -> int:
    return output_bytes(plan.folder, config, plan.request)


@pytest.mark.parametrize(
    "target",
    [Target(bits=2.25), Target(bits=3.5), Target(bits=7.9), Target(stored_bits=3.2), Target(stored_bits=4.2)]
    + [Target(size=size) for size in (20_000, 100_001, 400_000)],
    ids=str,
)
def test_rates_fill_what_was_asked_for(target: Target, plan: Plan) -> None:
    def size(config: QuantConfig) -> int:
        return size_of(plan, config)

    if target.size:  # beyond the least
        target = Target(size=target.size + size(plan.config))
    rated = target.choose(losses(plan.config), plan.config, size)
    assert target.holds(rated, size)
    assert len(rated.recipes) > 1
    assert set(rated.recipes) == {spec.bits for spec in rated.layers.values()}
    for group in losses(plan.config):
        assert len({rated.layers[name].bits for name in group.linears}) == 1
    if target.bits:
        assert target.bits - 0.1 < nominal_bits(rated.layers.values()) <= target.bits
    if target.stored_bits:
        assert target.stored_bits - 0.1 < stored_bits(rated.layers.values()) <= target.stored_bits
    if target.size:  # one bit more for the smallest group is 200 x 200 / 8 bytes
        assert target.size - 10_000 < size(rated) <= target.size


def test_what_costs_more_gets_more(plan: Plan) -> None:
    groups = losses(plan.config)
    rated = Target(bits=3.5).choose(groups, plan.config, lambda config: size_of(plan, config))
    density = []
    for group in groups:
        size = sum(rated.layers[n].out_features * rated.layers[n].in_features for n in group.linears)
        density.append((group.losses[2] / size, rated.layers[group.linears[0]].bits))
    density.sort()
    assert density[0][1] < density[-1][1]


def test_too_little(plan: Plan) -> None:
    def choose(target: Target) -> QuantConfig:
        return target.choose(losses(plan.config), plan.config, lambda config: size_of(plan, config))

    least = stored_bits(plan.config.layers.values())
    with pytest.raises(ValueError, match=rf"expected a target of at least {least:.4f} stored bits, got 2.05 stored"):
        choose(Target(stored_bits=2.05))
    smallest = size_of(plan, plan.config)
    with pytest.raises(ValueError, match=rf"at least {smallest:,} bytes, got 1,000 bytes"):
        choose(Target(size=1000))
    assert {spec.bits for spec in choose(Target(size=smallest)).layers.values()} == {2}
    assert {spec.bits for spec in choose(Target(size=10**9)).layers.values()} == {8}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected one out of bits, stored bits and size, got none"),
        ({"bits": 2, "size": 10}, "expected one out of .* got bits, size"),
        ({"bits": 1.5}, "expected bits from 2 to 8, got 1.5"),
        ({"bits": 8.5}, "expected bits from 2 to 8, got 8.5"),
    ],
)
def test_bad_targets(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target(**given)


def test_whole_bits_are_for_every_linear(model_folder, tmp_path: Path) -> None:
    for bits in (3, 3.0):
        plan = make_plan(small_request(model_folder("llama"), tmp_path / "out", bits))
        assert plan.target is None
        assert plan.config.provenance["rates"] == {"bits": 3}
        assert {spec.bits for spec in plan.config.layers.values()} == {3}
    plan = make_plan(small_request(model_folder("llama"), tmp_path / "out", None, stored_bits=3.5))
    assert plan.target == Target(stored_bits=3.5)
    assert plan.config.provenance["rates"] == {"stored_bits": 3.5}
    assert 3.4 < plan.stored_bits <= 3.5
    with pytest.raises(ValueError, match="expected sensitivity samples to find the rates with"):
        make_plan(small_request(model_folder("llama"), tmp_path / "out", 2.5, sensitivity_samples=0))


# --- the recipe file ------------------------------------------------------------------------------------------------


def test_a_recipe_there_and_back(plan: Plan, tmp_path: Path) -> None:
    groups = losses(plan.config)
    rated = Target(bits=3.5).choose(groups, plan.config, lambda config: size_of(plan, config))
    text = recipe_text(groups, rated, Target(bits=3.5), stored_bits(rated.layers.values()))
    (tmp_path / "recipe.toml").write_text(text)
    came, bits = load_recipe(tmp_path / "recipe.toml", rated.layers)
    assert came == text
    assert with_rates(plan.config, bits) == rated
    expected = sum(group.losses[rated.layers[group.linears[0]].bits] for group in groups)
    assert f"expected KL divergence {expected:.4g} nats" in text
    request = small_request(plan.folder.path, tmp_path / "out", None, recipe=str(tmp_path / "recipe.toml"))
    again = make_plan(request)
    assert again.config.layers == rated.layers
    assert again.recipe == text
    assert again.target is None


def test_patterns_and_the_last_word() -> None:
    text = """
    [[groups]]
    bits = 2
    linears = ["*"]
    [[groups]]
    bits = 4
    linears = ["*.down", "b.up"]
    losses = [1, 2]
    """
    rates = read_recipe(text, "file", ["a.up", "a.down", "b.up", "b.down"])
    assert rates == {"a.up": 2, "a.down": 4, "b.up": 4, "b.down": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = ", "file: expected TOML"),
        ("", r"file: expected tables \[\[groups\]\] and nothing else, came nothing"),
        ("bits = 2", r"expected tables \[\[groups\]\] and nothing else, came bits"),
        ("[[groups]]\nbits = 2", "group 1: expected bits, linears"),
        ("[[groups]]\nbits = 2\nlinears = ['*']\nlayers = 1", "group 1: expected bits, linears"),
        ("[[groups]]\nbits = 9\nlinears = ['*']", "group 1: expected whole bits from 2 to 8, came 9"),
        ("[[groups]]\nbits = 2.5\nlinears = ['*']", "expected whole bits from 2 to 8, came 2.5"),
        ("[[groups]]\nbits = true\nlinears = ['*']", "expected whole bits from 2 to 8, came True"),
        ("[[groups]]\nbits = 2\nlinears = '*'", "expected a list of names of linears"),
        ("[[groups]]\nbits = 2\nlinears = ['*']\n[[groups]]\nbits = 3\nlinears = ['c']", "group 2: 'c' is no linear"),
        ("[[groups]]\nbits = 2\nlinears = ['a']", "expected bits for every linear, b and 0 more have none"),
    ],
)
def test_bad_recipes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(text, "file", ["a", "b"])
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.toml: expected a recipe file"):
        load_recipe(tmp_path / "nothing.toml", ["a"])
