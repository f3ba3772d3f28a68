import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import ConfigError
from edgekit.recipe import (
    Data,
    Model,
    Recipe,
    Task,
    Train,
    make_recipe,
    qat_recipe,
    read_recipe,
    recipe_sha256,
    suggest,
    to_toml,
    with_preset,
)


def test_only_the_data_is_needed() -> None:
    recipe = make_recipe({"data": {"path": "photos"}})
    assert recipe == Recipe(data=Data(path="photos"))
    assert recipe.model.backbone == "tf_efficientnet_lite0"
    assert recipe.train.seed == 0


@given(
    path=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x7f"), min_size=1),
    rate=st.floats(1e-6, 1.0),
    epochs=st.integers(0, 1000),
)
def test_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, path: str, rate: float, epochs: int) -> None:
    recipe = Recipe(data=Data(path=path), train=Train(learning_rate=rate, epochs=epochs))
    file = tmp_path_factory.mktemp("r") / "recipe.toml"
    file.write_text(to_toml(recipe), encoding="utf-8")
    assert read_recipe(file) == recipe
    assert recipe_sha256(read_recipe(file)) == recipe_sha256(recipe)


def test_every_key_is_explained_in_the_toml() -> None:
    lines = to_toml(Recipe(data=Data(path="x"))).splitlines()
    for above, line in itertools.pairwise(lines):
        if "=" in line and not line.startswith("# The"):
            key = line.lstrip("# ").split(" ")[0]
            if key.isidentifier() and not above.startswith("["):
                assert above.startswith("# ") or line.startswith("#"), f"{key} has no explanation"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"data": {"path": "x"}, "trian": {}},
            "unknown key trian (known here: augment, data, detect, export, model, name",
        ),
        (
            {"data": {"path": "x"}, "train": {"epoch": 3}},
            "unknown key train.epoch (known here: batch_size, class_balance, device, ema_decay, epochs",
        ),
        ({}, "data: Field required"),
        (
            {"data": {"path": "x"}, "train": {"batch_size": 1}},
            "train.batch_size: Input should be greater than or equal to 2",
        ),
        (
            {"data": {"path": "x"}, "augment": {"scale": [1.2, 0.5]}},
            "augment.scale: Value error, expected 0 < low <= high",
        ),
        ({"data": {"path": "x"}, "model": {"input_size": [224]}}, "model.input_size"),
        ({"data": {"path": "x"}, "export": {"tolerance": 0}}, "export.tolerance: Input should be greater than 0"),
        (
            {"data": {"path": "x"}, "task": "detcet"},
            "task: Input should be 'classify', 'detect' or 'segment', got 'detcet'",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_with_what_was_expected(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_recipe(raw)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="edgekit init DATA"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("data = [", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_recipe(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        read_recipe(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("names", "flip"),
    [(("cat", "dog"), 0.5), (("turn_left", "turn_right"), 0.0), (("a", "b"), 0.0), (("0", "1", "10"), 0.0), ((), 0.5)],
)
def test_mirroring_is_off_where_sides_matter(names: tuple[str, ...], flip: float) -> None:
    assert suggest("x", names).augment.horizontal_flip == flip


def test_the_recipe_that_continues_a_run_quantization_aware(tmp_path: Path) -> None:
    source = Recipe(
        name="birds",
        data=Data(path="photos"),
        model=Model(backbone="resnet18", weights="old.pth", input_size=(96, 96)),
        train=Train(head_epochs=2, epochs=9, learning_rate=2e-3, batch_size=16, seed=7, precision="bfloat16"),
    )
    assert qat_recipe(source, tmp_path / "model.safetensors") == Recipe(
        data=Data(path="photos"),
        model=Model(backbone="resnet18", weights=str(tmp_path / "model.safetensors"), input_size=(96, 96)),
        train=Train(
            qat=True,
            head_epochs=0,
            epochs=3,
            unfrozen_fraction=1.0,
            learning_rate=2e-4,
            ema_decay=0.0,
            batch_size=16,
            seed=7,
            precision="float32",
        ),
    )


def test_what_is_left_out_suits_the_task() -> None:
    """Also in a recipe that an older `init` wrote, before a setting was there."""
    recipe = make_recipe(
        {"task": "segment", "data": {"path": "x"}, "train": {"epochs": 3}, "augment": {"scale": [1, 2]}}
    )
    assert recipe.task == "segment" and recipe.augment.scale == (1.0, 2.0)
    assert recipe.train == Train(
        epochs=3,
        batch_size=16,
        head_epochs=1,
        unfrozen_fraction=0.65,
        head_learning_rate=2e-3,
        learning_rate=2e-3,
        warmup_fraction=0.15,
        patience=15,
        ema_decay=0.0,
        views=0,
    )
    assert make_recipe({"task": "detect", "data": {"path": "x"}}).preprocess.resize == "letterbox"
    assert make_recipe({"task": "classify", "data": {"path": "x"}}).train == Train()
    with pytest.raises(ConfigError, match="train: Input should be a valid dictionary"):
        make_recipe({"task": "segment", "data": {"path": "x"}, "train": 3})


@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_presets_are_whole_recipes(task: Task) -> None:
    base = suggest("x", (), task)
    assert with_preset(base, "balanced") == base
    fast, best = with_preset(base, "fast"), with_preset(base, "best")
    assert fast.train.epochs < base.train.epochs < best.train.epochs
    assert fast.train.learning_rate == base.train.learning_rate and best.data == base.data
    for recipe in (fast, best):  # what a preset changes is valid
        assert make_recipe(recipe.model_dump(mode="json")) == recipe
    with pytest.raises(ConfigError, match=r"no preset is called 'quick' \(there are: fast, balanced, best\)"):
        with_preset(base, "quick")
