"""Chats with images, and what processors return, as calibration data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from awq.calibration import ModelInputs, load_calibration
from awq.errors import CalibrationError, ConfigError, MissingDependencyError, MissingFileError
from zoo.processors import PROCESSORS, chat, picture, processor_of
from zoo.vision import IMAGE

pytest.importorskip("PIL", reason="processors of images need Pillow")


@pytest.fixture(scope="module")
def llava() -> Any:
    return processor_of("llava")


def load(source: Any, processor: Any, **options: Any) -> Any:
    return load_calibration(source, processor.tokenizer, processor=processor, **options)


def text_of(sample: ModelInputs, processor: Any) -> str:
    return processor.tokenizer.decode(sample.input_ids[0])


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_a_chat_with_an_image_is_what_the_processor_makes_of_it(name: str) -> None:
    processor = processor_of(name)
    image = picture(24, 16)
    (sample,) = load([chat(image)], processor).samples
    expected = processor.apply_chat_template(
        [chat(image)], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert isinstance(sample, ModelInputs)
    assert sample.values.keys() == expected.keys()
    assert all(torch.equal(sample.values[key], expected[key]) for key in expected)
    assert int((sample.input_ids == IMAGE).sum()) > 1


def test_images_of_any_size_stand_side_by_side(llava: Any) -> None:
    found = load([chat(picture(8, 40)), chat(picture(64, 32)), "text alone"], llava)
    assert [isinstance(sample, ModelInputs) for sample in found.samples] == [True, True, False]
    assert found.tokens == sum(map(len, found.samples))
    assert "3 samples" in found.describe() and "(2 inputs with images)" in found.describe()


def test_a_file_of_chats_names_its_images_from_where_it_lies(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    picture(20, 20).save(tmp_path / "data" / "images" / "a.png")
    rows = [{"messages": chat("images/a.png")}, {"messages": [{"role": "user", "content": "No image."}]}]
    for name, text in (("a.jsonl", "\n".join(map(json.dumps, rows))), ("a.json", json.dumps(rows))):
        (tmp_path / "data" / name).write_text(text)
        monkeypatch.chdir(tmp_path)
        one, other = load(f"data/{name}", llava).samples
        assert text_of(one, llava).count("<image>") == 16
        assert llava.tokenizer.decode(other) == "user: No image.;"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "path": "a.png"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "image": "file://{}/a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
    ],
)
def test_every_usual_way_to_name_an_image_works(
    part: dict[str, Any], llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(16, 16, seed=3).save(tmp_path / "a.png")
    part = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in part.items()}
    (sample,) = load([[{"role": "user", "content": [part]}]], llava).samples
    (expected,) = load([chat(picture(16, 16, seed=3))], llava).samples
    assert torch.equal(sample.values["pixel_values"], expected.values["pixel_values"])


def test_what_a_processor_returned_is_taken_as_it_is(llava: Any) -> None:
    given = llava(text=["a <image>", "bcd <image>!"], images=[picture(9, 9), picture(30, 9)], padding=True)
    for source in (given, [given], dict(given)):
        (sample,) = load_calibration(source, None).samples
        assert sample.input_ids.shape == (2, 21) and len(sample) == 18 + 21
        assert sample.values["pixel_values"].shape == (2, 3, 16, 16)
        assert [len(row) for row in sample.rows] == [18, 21]


def test_what_a_tokenizer_returned_is_text(llava: Any) -> None:
    given = llava.tokenizer(["abc", "defgh"], padding=True, return_tensors="pt")
    found = load_calibration([given, llava.tokenizer("ij")], None, seq_len=4)
    assert [llava.tokenizer.decode(sample) for sample in found.samples] == ["abc", "defg", "h", "ij"]
    types = {"input_ids": [[3, 4]], "token_type_ids": [[0, 0]]}
    assert isinstance(load_calibration(types, None).samples[0], torch.Tensor)
    types["token_type_ids"] = [[0, 1]]
    assert isinstance(load_calibration(types, None).samples[0], ModelInputs)


def test_inputs_with_images_are_counted_by_rows(llava: Any) -> None:
    given = llava(text=["a <image>", "b <image>"], images=[picture(9, 9), picture(30, 9)], padding=True)
    assert len(load_calibration([given, given, given], None, samples=4).samples) == 2


def test_the_fingerprint_covers_the_pixels(llava: Any) -> None:
    prints = {load([chat(picture(16, 16, seed=seed))], llava).fingerprint() for seed in (0, 0, 1)}
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pixel_values": torch.zeros(1)}, "the given list, number 1 has no input_ids, but pixel_values"),
        ({"input_ids": [[1, 2], [3]]}, "rows of one length"),
        ({"input_ids": [[1.5, 2.0]]}, "must be whole numbers"),
        ({"input_ids": [[-1, 2]], "pixel_values": [[1.0]]}, "holds the token id -1"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"shape of input_ids, \(1, 2\)"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "a real token in every row"),
        ({"input_ids": [[1, 2]], "pixel_values": [[1.0], "x"]}, 'return_tensors="pt"'),
    ],
)
def test_what_is_no_models_input_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        load_calibration([values], None)


def test_a_missing_image_is_named_with_its_place(llava: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "fine"}]}, {"messages": chat("gone.png")}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(MissingFileError, match=r"a\.jsonl, number 2 names .*gone\.png, which does not exist"):
        load(tmp_path / "a.jsonl", llava)


def test_a_file_that_is_no_image_is_refused(llava: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(CalibrationError, match=r"a\.png, which is no image: cannot identify"):
        load([chat(tmp_path / "a.png")], llava)


def test_images_without_pillow_say_what_to_install(
    llava: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(9, 9).save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'openawq\[vision\]'"):
        load([chat(tmp_path / "a.png")], llava)


def test_images_without_a_processor_are_refused(llava: Any) -> None:
    with pytest.raises(ConfigError, match="holds images, which need the model's processor"):
        load_calibration([chat(picture(9, 9))], llava.tokenizer)


def test_what_the_processor_says_is_told(llava: Any) -> None:
    processor = processor_of("llava")
    processor.chat_template = None
    with pytest.raises(CalibrationError, match=r"does not take a conversation of it: .*chat template"):
        load([chat(picture(9, 9))], processor)
