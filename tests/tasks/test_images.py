"""Image classification: decoding, the processor's numbers, augmentation, folders, and federated runs."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from fixtures.shared import shared
from fixtures.tiny import ledger
from PIL import Image
from torch import nn

import fedlora
from fedlora import config
from fedlora.core.errors import ConfigError, DataError
from fedlora.tasks import Files, ImageClassification, ImageFolder, Model, Prepared, Source
from fedlora.tasks.images import pixels as pixels_module
from fedlora.tasks.images.images import PreparedImages, augment
from fedlora.tasks.images.pixels import decode, load_processor
from fedlora.tuning import HeadOnly, LoRA, Tuning

CPU = torch.device("cpu")
COLOURS = {"blue": (40, 60, 220), "green": (30, 200, 60), "red": (220, 50, 40)}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LOCAL = {"optimizer": {"kind": "adamw", "lr": 0.01}, "batch_size": 4, "epochs": 4}


# ---- a small world


def picture(colour: str, seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Noise around a colour."""
    noise = np.random.default_rng(seed).normal(0, 10, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def as_bytes(image: Image.Image, form: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


def save_vit(folder: Path, processor: dict[str, Any] | None = None, patch_size: int = 8) -> Path:
    torch.manual_seed(0)
    settings = transformers.ViTConfig(image_size=32, patch_size=patch_size, num_labels=5, **VIT)
    transformers.ViTForImageClassification(settings).save_pretrained(folder)
    own = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2}
    own |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(own | (processor or {})))
    return folder


def save_mobilenet(folder: Path) -> Path:
    torch.manual_seed(0)
    small = {"depth_multiplier": 0.1, "finegrained_output": False, "image_size": 32}
    settings = transformers.MobileNetV2Config(num_labels=5, classifier_dropout_prob=0.1, **small)
    model = transformers.MobileNetV2ForImageClassification(settings)
    model.train()
    images = [np.asarray(picture(colour, number, (32, 32))) for colour in COLOURS for number in range(200, 208)]
    seen = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():  # statistics such as pre-training leaves, else signals die out layer by layer
        for _ in range(3):
            model(pixel_values=seen)
    model.save_pretrained(folder)
    own = {"image_processor_type": "MobileNetV2ImageProcessor", "size": {"shortest_edge": 36}}
    own |= {"crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    return folder


def make_folder(root: Path, count: int, first: int = 0) -> Path:
    for colour in COLOURS:
        (root / colour).mkdir(parents=True)
        for number in range(first, first + count):
            picture(colour, number).save(root / colour / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``vit``, ``mobilenet``, and 24 pictures for training and 9 for testing as a folder and as parquet."""
    root = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root / "datasets"))
        patch.setenv("FEDLORA_CACHE", str(root / "cache"))
        save_vit(root / "vit")
        save_mobilenet(root / "mobilenet")
        make_folder(root / "folder" / "train", 8)
        make_folder(root / "folder" / "test", 3, 100)
        for split, rows in (("train", rows_of(8)), ("test", rows_of(3, 100))):
            features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(COLOURS)))
            datasets.Dataset.from_list(rows, features=features).to_parquet(root / f"{split}.parquet")
        yield root


def rows_of(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"image": {"bytes": as_bytes(picture(colour, number)), "path": None}, "label": label}
        for label, colour in enumerate(COLOURS)
        for number in range(first, first + count)
    ]


def prepare(world: Path, source: Source, model: str = "vit", **settings: Any) -> PreparedImages:
    prepared = ImageClassification(**settings).prepare(Model(path=str(world / model)), source)
    assert isinstance(prepared, PreparedImages)
    return prepared


def parquet(world: Path, **more: Any) -> Files:
    return Files(**{"train": str(world / "train.parquet"), "test": str(world / "test.parquet"), **more})


def json_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def own_answer(folder: Path, images: list[Image.Image], **settings: Any) -> torch.Tensor:
    """What the model's own processor says."""
    own = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **settings)
    answer: torch.Tensor = own(images=images, return_tensors="pt")["pixel_values"]
    return answer


# ---- pictures become what the model's own processor makes of them


@pytest.mark.parametrize("model", ["vit", "mobilenet"])
def test_a_batch_is_what_the_processor_gives(world: Path, model: str) -> None:
    batch = prepare(world, parquet(world), model).batch(np.array([20, 3, 3]), CPU)
    expected = own_answer(world / model, [picture("red", 4), picture("blue", 3), picture("blue", 3)])
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-6, rtol=1e-6)
    assert batch["labels"].tolist() == [2, 0, 0]


def test_normalisation_by_hand(world: Path) -> None:
    processor = load_processor(Model(path=str(world / "vit")), None)
    found = processor.normalise(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8))
    # (x / 255 - mean) / std with means .5 .4 .3 and deviations .2 .3 .4
    expected = torch.tensor([-0.5 / 0.2, (0.2 - 0.4) / 0.3, (1 - 0.3) / 0.4])
    torch.testing.assert_close(found[0, :, 0, 0], expected)
    assert found.shape == (1, 3, 1, 1)


def test_a_batch_lies_channels_last_in_memory(world: Path) -> None:
    pixels = prepare(world, parquet(world)).batch(np.arange(4), CPU)["pixel_values"]
    assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_a_smaller_size_changes_the_processor_in_proportion(world: Path) -> None:
    task = prepare(world, parquet(world), "mobilenet", size=16)
    expected = own_answer(
        world / "mobilenet",
        [picture("blue", 0)],
        size={"shortest_edge": 18},
        crop_size={"height": 16, "width": 16},
    )
    torch.testing.assert_close(task.batch(np.array([0]), CPU)["pixel_values"], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("model", ["vit", "mobilenet"])
def test_a_model_takes_smaller_pictures(world: Path, model: str) -> None:
    task = prepare(world, parquet(world), model, size=16)
    network = task.load_model(0, "fp32", CPU)[0]
    batch = task.batch(np.arange(3), CPU)
    settings = {"interpolate_pos_encoding": True} if model == "vit" else {}
    with torch.no_grad():
        expected = transformers.AutoModelForImageClassification.from_pretrained(world / model)
        backbone = getattr(expected, expected.base_model_prefix)
        hidden = backbone(pixel_values=batch["pixel_values"], **settings).last_hidden_state
        found = getattr(network, expected.base_model_prefix)(pixel_values=batch["pixel_values"]).last_hidden_state
        assert network(pixel_values=batch["pixel_values"]).logits.shape == (3, 3)
    torch.testing.assert_close(found, hidden, atol=1e-5, rtol=1e-5)
    assert "16 x 16 pixels" in task.usage  # for the model card, as `transformers` refuses a ViT's without the argument
    assert "pass `interpolate_pos_encoding=True` in each call" in task.usage
    assert ImageClassification().restore(Model(path=str(world / model)), list(COLOURS)).usage == ""


def test_a_size_that_the_model_does_not_take_is_refused(world: Path, tmp_path: Path) -> None:
    save_vit(tmp_path, patch_size=16)
    task = ImageClassification(size=8).restore(Model(path=str(tmp_path)), list(COLOURS))
    with pytest.raises(ConfigError, match=r"the model does not accept images of 8 x 8 \(.+\): leave task.size out"):
        task.load_model(0, "fp32", CPU)


def test_a_size_that_the_processor_does_not_hear_is_refused(tmp_path: Path) -> None:
    save_vit(tmp_path, {"do_pad": True, "pad_size": {"height": 32, "width": 32}})
    with pytest.raises(ConfigError, match="cannot be set to give images of height 16: leave task"):
        load_processor(Model(path=str(tmp_path)), 16)


def test_a_processor_that_keeps_proportions_is_refused(world: Path, tmp_path: Path) -> None:
    save_vit(tmp_path / "vit", {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}})
    own = json.loads((tmp_path / "vit" / "preprocessor_config.json").read_text()) | {"do_center_crop": False}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(own))
    with pytest.raises(ConfigError, match="keeps the proportions of images"):
        load_processor(Model(path=str(tmp_path / "vit")), None)


def test_another_processor_is_another_fingerprint(world: Path, tmp_path: Path) -> None:
    found = []
    for name, settings in (("one", None), ("two", None), ("three", {"image_mean": [0.0, 0.0, 0.0]})):
        save_vit(tmp_path / name)
        file = tmp_path / name / "preprocessor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **(settings or {})}))
        found.append(prepare(world, parquet(world), str(tmp_path / name)).fingerprints["processor"])
    assert found[0] == found[1] != found[2]


def test_a_processor_that_normalises_twice_is_followed(tmp_path: Path) -> None:
    save_vit(tmp_path, {"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True})
    processor = load_processor(Model(path=str(tmp_path)), None)
    pixels = torch.from_numpy(processor.resize(picture("green", 1)))[None]
    expected = own_answer(tmp_path, [picture("green", 1)])
    torch.testing.assert_close(processor.normalise(pixels), expected, atol=1e-4, rtol=1e-5)


def test_a_model_without_a_processor_is_one_sentence(world: Path, tmp_path: Path) -> None:
    save_vit(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_processor(Model(path=str(tmp_path)), None)


# ---- forms of pictures


def flat(mode: str, value: Any) -> Image.Image:
    return Image.new(mode, (4, 2), value)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (as_bytes(flat("RGB", (1, 2, 3))), (1, 2, 3)),
        (as_bytes(flat("L", 7)), (7, 7, 7)),
        (as_bytes(flat("1", 1)), (255, 255, 255)),
        (as_bytes(flat("RGBA", (9, 9, 9, 0))), (255, 255, 255)),
        (as_bytes(flat("LA", (9, 255))), (9, 9, 9)),
        (as_bytes(flat("RGB", (5, 6, 7)), "GIF"), (5, 6, 7)),
        (as_bytes(Image.fromarray(np.full((2, 4), 0x0A00 + 77, np.uint16))), (10, 10, 10)),
        (as_bytes(flat("CMYK", (0, 255, 255, 0)), "JPEG"), (254, 0, 0)),
        (as_bytes(flat("RGB", (5, 6, 7)).quantize(2), transparency=0), (255, 255, 255)),
        (as_bytes(flat("RGB", (5, 6, 7)), "GIF", save_all=True, append_images=[flat("RGB", (200, 0, 0))]), (5, 6, 7)),
        (as_bytes(flat("RGB", (1, 2, 3)), "JPEG", exif=b"Exif\0\0no such block"), (1, 2, 3)),
    ],
)
def test_every_mode_becomes_red_green_and_blue(raw: bytes, expected: tuple[int, int, int]) -> None:
    found = decode(raw, "it")
    assert (found.mode, found.size) == ("RGB", (4, 2))
    assert found.getpixel((0, 0)) == pytest.approx(expected, abs=1)


def test_a_picture_is_turned_upright() -> None:
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to see it
    assert decode(as_bytes(image, "JPEG", exif=exif), "it").size == (2, 4)


def test_pixels_without_a_range_are_refused() -> None:
    with pytest.raises(DataError, match="row 3 has 32-bit pixels"):
        decode(as_bytes(flat("F", 0.5), "TIFF"), "row 3")


GOOD = as_bytes(picture("red", 0))
BOMB = zlib.compress(bytes(1 << 22))
TEXT = len(b"k\0\0" + BOMB).to_bytes(4) + b"zTXtk\0\0" + BOMB + zlib.crc32(b"zTXtk\0\0" + BOMB).to_bytes(4)
PHOTO = as_bytes(picture("red", 0), "JPEG")


@pytest.mark.parametrize("raw", [
    b"", b"not a picture", GOOD[:60], GOOD[:-400], GOOD[:40] + bytes(40) + GOOD[80:], PHOTO[: len(PHOTO) // 2],
    GOOD[:33] + TEXT + GOOD[33:], b"<svg xmlns='http://www.w3.org/2000/svg'/>",
])  # fmt: skip
def test_garbage_names_its_row(world: Path, tmp_path: Path, raw: bytes) -> None:
    rows = rows_of(2)
    rows[4]["image"]["bytes"] = raw
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "bad.parquet")
    prepare(world, parquet(world))
    with pytest.raises(
        DataError, match=r"row 4 of the training rows cannot be read as an image \(.+\): correct or remove"
    ):
        prepare(world, Files(train=str(tmp_path / "bad.parquet")))
    assert list(pixels_module.cache_folder().rglob("*.npy"))
    assert not list(pixels_module.cache_folder().rglob("*.tmp"))


def test_a_file_that_is_not_there_names_its_row(world: Path, tmp_path: Path) -> None:
    rows = [{"image": str(world / "folder/test/red/100.png"), "label": "a"}, {"image": "lost.png", "label": "b"}]
    with pytest.raises(DataError, match=r"row 1 of the training rows \('lost.png'\) cannot be read"):
        prepare(world, Files(train=json_lines(tmp_path / "rows.jsonl", rows)))


@pytest.mark.parametrize("image", [7, {"bytes": None, "path": None, "x": 1}])
def test_what_is_no_picture_at_all_names_its_row(world: Path, tmp_path: Path, image: Any) -> None:
    rows = [{"image": image, "label": label} for label in "ab"]
    with pytest.raises(DataError, match="row 0 of the training rows holds no image"):
        prepare(world, Files(train=json_lines(tmp_path / "rows.jsonl", rows)))


# ---- sources


def test_bytes_paths_and_folders_read_the_same(world: Path, tmp_path: Path) -> None:
    def path_rows(split: str, count: int, first: int) -> str:
        rows = [
            {"image": str(world / "folder" / split / colour / f"{number}.png"), "label": label, "label_name": colour}
            for label, colour in enumerate(COLOURS)
            for number in range(first, first + count)
        ]
        return json_lines(tmp_path / f"{split}.jsonl", rows)

    tasks = [
        prepare(world, parquet(world)),
        prepare(world, Files(train=path_rows("train", 8, 0), test=path_rows("test", 3, 100))),
        prepare(world, ImageFolder(path=str(world / "folder"))),
        prepare(world, ImageFolder(path=str(world / "folder/train"), test=str(world / "folder/test"))),
    ]
    for task in tasks:
        assert task.label_names == list(COLOURS)
        for split, count in (("train", 24), ("test", 9)):
            assert task.num_examples(split) == count  # type: ignore[arg-type]
            rows = np.arange(count)
            found, expected = (one.batch(rows, CPU, split) for one in (task, tasks[0]))  # type: ignore[arg-type]
            assert torch.equal(found["pixel_values"], expected["pixel_values"])
            assert torch.equal(found["labels"], expected["labels"])
    assert tasks[2].column("file", "train")[:2].tolist() == ["blue/0.png", "blue/1.png"]


def test_the_fingerprint_hears_pictures_and_no_places(world: Path, tmp_path: Path) -> None:
    def of(root: Path) -> str:
        return prepare(world, ImageFolder(path=str(root))).fingerprint

    make_folder(tmp_path / "a" / "train", 8)
    make_folder(tmp_path / "a" / "test", 3, 100)
    assert of(tmp_path / "a") == of(world / "folder")
    picture("red", 7).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "a/train/red/7.png")
    assert of(tmp_path / "a") != of(world / "folder")


def test_equal_pictures_fall_on_one_side(world: Path, tmp_path: Path) -> None:
    make_folder(tmp_path, 8)
    for colour in COLOURS:
        for number in range(8):
            twin = tmp_path / colour / f"twin{number}.PNG"
            twin.write_bytes((tmp_path / colour / f"{number}.png").read_bytes())
    task = prepare(world, ImageFolder(path=str(tmp_path), test_fraction=0.4))
    train, test = (set(task.data[split]["image"]) for split in ("train", "test"))
    assert not train & test
    assert (len(train) + len(test), task.num_examples("train") + task.num_examples("test")) == (24, 48)
    rows = np.arange(task.num_examples("test"))
    pixels = task.batch(rows, CPU, "test")["pixel_values"]
    places = [tmp_path / COLOUR / Path(name).name for COLOUR, name in map(halves, task.column("file", "test"))]
    expected = own_answer(world / "vit", [Image.open(path) for path in places])
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=1e-6)


def halves(file: str) -> tuple[str, str]:
    first, _, second = file.partition("/")
    return first, second


def test_folders_may_nest_and_hold_other_things(tmp_path: Path) -> None:
    make_folder(tmp_path, 2)
    (tmp_path / "red" / "more").mkdir()
    picture("red", 5).save(tmp_path / "red" / "more" / "x.JPG", "JPEG")
    (tmp_path / "red" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    rows = ImageFolder(path=str(tmp_path)).load().train
    assert rows.features["label"].names == list(COLOURS)
    assert rows["file"][4:] == ["red/0.png", "red/1.png", "red/more/x.JPG"]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "plane"):
        (tmp_path / name).mkdir()
        picture("red", 1).save(tmp_path / name / "1.png")
    assert ImageFolder(path=str(tmp_path)).load().train.features["label"].names == ["plane", "train"]


def test_folders_without_sense_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        ImageFolder(path=str(tmp_path / "none")).load()
    with pytest.raises(DataError, match="no folders with images"):
        ImageFolder(path=str(tmp_path)).load()
    make_folder(tmp_path, 1)
    (tmp_path / "red").rename(tmp_path / "pink")
    with pytest.raises(DataError, match=r"1 classes that no training image has \(such as 'pink'\)"):
        ImageFolder(path=str(world / "folder"), test=str(tmp_path)).load()
    for name in ("blue", "green"):
        (tmp_path / name / "0.png").unlink()
    with pytest.raises(DataError, match="all rows have the class 'pink', but classification needs two"):
        prepare(world, ImageFolder(path=str(tmp_path)))


# ---- the cache


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was decoded since, and a cache that is empty."""
    names: list[str] = []

    def counted(raw: bytes, which: str) -> Image.Image:
        names.append(which)
        return decode(raw, which)

    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pixels_module, "decode", counted)
    return names


def test_a_picture_is_decoded_once(world: Path, tmp_path: Path, opened: list[str]) -> None:
    first = prepare(world, parquet(world)).batch(np.arange(5), CPU)["pixel_values"]
    assert len(opened) == 33
    again = prepare(world, ImageFolder(path=str(world / "folder")), augmentation="flip")
    assert len(opened) == 33
    assert torch.equal(again.batch(np.arange(5), CPU)["pixel_values"], first)
    assert isinstance(again._pictures["train"].pixels, np.memmap)
    prepare(world, parquet(world), size=16)
    assert len(opened) == 66


def test_a_damaged_cache_is_made_anew(
    world: Path, tmp_path: Path, opened: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    expected = prepare(world, parquet(world)).batch(np.arange(5), CPU)["pixel_values"]
    files = list((tmp_path / "cache" / "pictures").iterdir())
    assert len(files) == 2
    for file, kept in zip(files, (20, 5000), strict=True):
        file.write_bytes(file.read_bytes()[:kept])
    assert torch.equal(prepare(world, parquet(world)).batch(np.arange(5), CPU)["pixel_values"], expected)
    assert len(opened) == 66
    caplog.clear()
    for file in files:
        content = bytearray(file.read_bytes())
        content[5000] ^= 1
        file.write_bytes(content)
    assert torch.equal(prepare(world, parquet(world)).batch(np.arange(5), CPU)["pixel_values"], expected)
    assert len(opened) == 99
    assert {one.getMessage() for one in caplog.records} == {
        f"the cached file {file} is damaged, and is made anew" for file in files
    }


def test_a_cache_that_cannot_be_written_costs_memory(
    world: Path, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "file" / "cache"))
    found = prepare(world, parquet(world)).batch(np.array([20]), CPU)["pixel_values"]
    torch.testing.assert_close(found, own_answer(world / "vit", [picture("red", 4)]), atol=1e-6, rtol=1e-6)


# ---- augmentation


def numbered(count: int, height: int = 16, width: int = 24) -> torch.Tensor:
    """Pictures whose pixels are all different, and never zero."""
    return 1 + torch.arange(count * 3 * height * width, dtype=torch.float32).view(count, 3, height, width)


def test_flip_mirrors_half_of_the_pictures() -> None:
    torch.manual_seed(0)
    pixels = numbered(200, 2, 3)
    found = augment(pixels, "flip")
    flipped = [torch.equal(new, old.flip(-1)) for new, old in zip(found, pixels, strict=True)]
    same = [torch.equal(new, old) for new, old in zip(found, pixels, strict=True)]
    assert sum(flipped) + sum(same) == 200
    assert 70 < sum(flipped) < 130


def test_crop_moves_each_picture_by_up_to_an_eighth() -> None:
    torch.manual_seed(0)
    pixels = numbered(300)
    padded = nn.functional.pad(pixels, (3, 3, 2, 2))
    seen = set()
    for number, new in enumerate(augment(pixels, "crop_flip")):
        moves = [
            (top, left, flipped)
            for top in range(5)
            for left in range(7)
            for flipped in (False, True)
            if torch.equal(new.flip(-1) if flipped else new, padded[number, :, top : top + 16, left : left + 24])
        ]
        assert len(moves) == 1
        seen.update(moves)
    assert len(seen) > 60  # of 5 * 7 * 2
    assert {top for top, _, _ in seen} == set(range(5))
    assert {left for _, left, _ in seen} == set(range(7))


def test_augmentation_is_drawn_from_the_default_generator() -> None:
    pixels = numbered(20)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(pixels, "crop_flip"))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert results[0].is_contiguous(memory_format=torch.channels_last)


class Recorder(nn.Module):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, pixel_values: torch.Tensor) -> Any:
        self.seen.append(pixel_values)
        return transformers.modeling_outputs.ImageClassifierOutput(logits=pixel_values.mean((2, 3)) * self.weight)


@pytest.mark.parametrize("dropout", [True, False])
def test_pictures_change_in_training_alone(world: Path, dropout: bool) -> None:
    task = prepare(world, parquet(world), augmentation="flip")
    model, rows = Recorder().train(dropout), np.arange(24)
    as_it_is = task.batch(rows, CPU)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.inference_mode():
        task.evaluate(model, rows, "train", CPU)
        task.loss(model, task.batch(rows, CPU))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one, as_it_is["pixel_values"]) for one in model.seen)
    task.loss(model, as_it_is).backward()
    changed = (model.seen[-1] != as_it_is["pixel_values"]).flatten(1).any(1)
    assert 0 < int(changed.sum()) < 24


def test_none_draws_nothing(world: Path) -> None:
    task, model = prepare(world, parquet(world)), Recorder()
    before = torch.get_rng_state()
    batch = task.batch(np.arange(24), CPU)
    task.loss(model, batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.seen[0], batch["pixel_values"])


# ---- model, evaluation, prediction


def model_of(task: Prepared) -> nn.Module:
    return task.load_model(0, "fp32", CPU)[0].eval()


@pytest.mark.parametrize("model", ["vit", "mobilenet"])
def test_the_head_is_new_and_knows_the_names(world: Path, model: str) -> None:
    task = prepare(world, parquet(world), model)
    network, head = task.load_model(0, "fp32", CPU)
    assert head == {"classifier.weight", "classifier.bias"}
    assert network.get_parameter("classifier.weight").shape[0] == 3
    assert network.config.id2label == dict(enumerate(COLOURS))  # type: ignore[union-attr]


def test_evaluation_is_the_same_in_any_batches(world: Path) -> None:
    rows = np.array([8, 1, 5, 0, 3])
    found = []
    for size in (1, 2, 64):
        task = prepare(world, parquet(world), eval_batch_size=size)
        with torch.inference_mode():
            found.append(task.evaluate(model_of(task), rows, "test", CPU))
    logits = model_of(task)(pixel_values=task.batch(rows, CPU, "test")["pixel_values"]).logits
    labels = torch.tensor([2, 0, 1, 0, 1])
    assert found[0].metrics == pytest.approx(found[2].metrics, abs=1e-6)
    assert found[1].metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert found[1].metrics["loss"] == pytest.approx(
        float(nn.functional.cross_entropy(logits, labels).detach()), abs=1e-5
    )
    assert set(found[0].metrics) == {"accuracy", "macro_f1", "loss"}


def test_one_class_for_everything_is_said(world: Path) -> None:
    task = prepare(world, parquet(world))
    model = model_of(task)
    with torch.inference_mode():
        model.get_parameter("classifier.bias")[1] = 1e3
        assert "predicts one class only, 'green'" in task.evaluate(model, np.arange(9), "test", CPU).warnings[0]


def test_predictions_are_for_paths(world: Path, tmp_path: Path) -> None:
    task = ImageClassification(eval_batch_size=2).restore(Model(path=str(world / "vit")), list(COLOURS))
    model = model_of(task)
    paths = [str(world / "folder/test" / colour / "101.png") for colour in COLOURS]
    with torch.inference_mode():
        found = task.predict(model, paths, CPU)
        images = [picture(colour, 101) for colour in COLOURS]
        expected = model(pixel_values=own_answer(world / "vit", images)).logits.softmax(1)
    for answer, shares in zip(found, expected, strict=True):
        assert list(answer.values()) == sorted(answer.values(), reverse=True)
        assert answer == pytest.approx(dict(zip(COLOURS, shares.tolist(), strict=True)), abs=1e-5)
    with pytest.raises(DataError, match=r"'nothing\.png' cannot be read"):
        task.predict(model, [paths[0], "nothing.png"], CPU)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match=r"text.png' cannot be read as an image"):
        task.predict(model, [str(tmp_path / "text.png")], CPU)


@pytest.mark.parametrize("size", [(12_000, 12_000), (60_000, 60_000), (89_478_486, 1)])
def test_a_picture_of_too_many_pixels_is_not_decoded(size: tuple[int, int]) -> None:
    header = struct.pack(">II", *size) + b"\x08\x02\0\0\0"
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    with pytest.raises(DataError, match=r"row 3 has more than 89,478,485 pixels, which is the most that is decoded"):
        decode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks), "row 3")


def test_other_test_rows_are_read_by_name(world: Path, tmp_path: Path) -> None:
    task = ImageClassification().restore(Model(path=str(world / "vit")), list(COLOURS))
    rows = [{"picture": str(world / f"folder/test/{colour}/102.png"), "label": colour} for colour in ("red", "blue")]
    other = task.with_rows(Path(json_lines(tmp_path / "rows.jsonl", rows)), {"image": "picture"})
    assert other.batch(np.arange(2), CPU, "test")["labels"].tolist() == [2, 0]
    folder = task.with_rows(world / "folder" / "test", {})
    assert folder.num_examples("test") == 9
    with torch.inference_mode():
        assert folder.evaluate(model_of(task), np.arange(9), "test", CPU).metrics["loss"] > 0
    rows[0]["label"] = "pink"
    with pytest.raises(DataError, match="the model lacks: pink"):
        task.with_rows(Path(json_lines(tmp_path / "rows.jsonl", rows)), {"image": "picture"})


def test_the_processor_is_saved_with_the_size_of_the_task(world: Path, tmp_path: Path) -> None:
    task = ImageClassification(size=16).restore(Model(path=str(world / "mobilenet")), list(COLOURS))
    task.save_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert processor(images=picture("red", 0), return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(("model", "size"), [("vit", 32), ("mobilenet", 128)])
def test_embeddings_are_means_of_the_last_hidden_state(world: Path, model: str, size: int) -> None:
    task = prepare(world, parquet(world), model)
    found = task.embeddings("test", CPU)
    network = transformers.AutoModel.from_pretrained(world / model).eval()
    with torch.inference_mode():
        hidden = network(pixel_values=task.batch(np.arange(9), CPU, "test")["pixel_values"]).last_hidden_state
    assert found.shape == (9, size)
    means = hidden.mean(1) if model == "vit" else hidden.mean((2, 3))
    np.testing.assert_allclose(found, means.numpy(), atol=1e-5)


def test_there_are_no_texts(world: Path) -> None:
    with pytest.raises(DataError, match="no texts to cluster"):
        prepare(world, parquet(world)).texts("train")


# ---- several classes


def sets(world: Path, split: str, count: int, first: int) -> list[dict[str, Any]]:
    """Each picture's class and ``odd`` or nothing; green ones have no class."""
    return [
        {
            "image": str(world / "folder" / split / colour / f"{number}.png"),
            "label": [*[colour] * (colour != "green"), *["odd"] * (number % 2)],
        }
        for colour in COLOURS
        for number in range(first, first + count)
    ]


def test_a_picture_may_have_several_classes_or_none(world: Path, tmp_path: Path) -> None:
    files = Files(
        train=json_lines(tmp_path / "train.jsonl", sets(world, "train", 8, 0)),
        test=json_lines(tmp_path / "test.jsonl", sets(world, "test", 3, 100)),
    )
    task = prepare(world, files, problem="multi")
    assert task.label_names == ["blue", "odd", "red"]
    assert (task.main_metric, task.higher_is_better) == ("micro_f1", True)
    batch = task.batch(np.array([0, 1, 8, 17]), CPU)
    assert batch["labels"].tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]]
    assert task.labels[[0, 1, 17]].tolist() == [0, 0, 1]
    model = model_of(task)
    logits = model(pixel_values=batch["pixel_values"]).logits
    expected = nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"])
    assert float(task.loss(model, batch).detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    with torch.inference_mode():
        assert {"micro_f1", "macro_f1"} < set(task.evaluate(model, np.arange(9), "test", CPU).metrics)
        answer = task.predict(model, [str(world / "folder/test/red/100.png")], CPU)[0]
        shares = model(pixel_values=own_answer(world / "vit", [picture("red", 100)])).logits.sigmoid()[0]
    assert answer == pytest.approx(dict(zip(task.label_names, shares.tolist(), strict=True)), abs=1e-5)
    again = task.with_rows(tmp_path / "test.jsonl", {})
    assert torch.equal(
        again.batch(np.arange(9), CPU, "test")["labels"], task.batch(np.arange(9), CPU, "test")["labels"]
    )
    with pytest.raises(DataError, match="holds no lists"):
        prepare(world, ImageFolder(path=str(world / "folder")), problem="multi")


# ---- federated runs


def run(world: Path, out: Path, model: str, method: dict[str, Any], rounds: int = 2, **task: Any) -> fedlora.Result:
    values = {
        "label": "images",
        "model": {"path": str(world / model)},
        "data": {"kind": "image_folder", "path": str(world / "folder")},
        "task": {"kind": "image_classification", **task},
        "clients": {"num": 4, "per_round": 3, "partition": {"kind": "iid"}},
        "method": {"rounds": rounds, "local": LOCAL, **method},
    }
    return fedlora.run(config.parse(values), out)


@pytest.mark.parametrize(
    ("model", "method", "least"),
    [
        ("vit", {"kind": "lora", "rank": 4}, 0.7),
        ("vit", {"kind": "federa", "rank": 4}, 0.7),
        ("mobilenet", {"kind": "fedavg", "tuning": {"kind": "head_only"}}, 0.6),
        # seventeen layers of random numbers: it runs, and learns on real weights, see below
        ("mobilenet", {"kind": "lora", "rank": 4}, 0.0),
    ],
    ids=["vit-lora", "vit-federa", "mobilenet-head", "mobilenet-lora"],
)
def test_a_federation_learns_colours(
    world: Path, tmp_path: Path, model: str, method: dict[str, Any], least: float
) -> None:
    result = run(world, tmp_path / "a", model, method, rounds=3, augmentation="flip")
    assert result.after["accuracy"] >= least
    trained = fedlora.load_run(tmp_path / "a")
    answer = trained.predict([str(world / "folder/test/red/100.png")])[0]
    assert set(answer) == set(COLOURS)
    assert trained.evaluate(world / "folder" / "test").metrics == pytest.approx(result.after, abs=1e-5)


def test_the_same_run_gives_the_same_bits(world: Path, tmp_path: Path) -> None:
    method = {"kind": "lora", "rank": 4}
    for name, augmentation in (("a", "crop_flip"), ("b", "crop_flip"), ("c", "none")):
        run(world, tmp_path / name, "vit", method, augmentation=augmentation)
    assert ledger(tmp_path / "a") == ledger(tmp_path / "b")
    assert ledger(tmp_path / "a") != ledger(tmp_path / "c")


def test_a_convolution_with_an_adapter_keeps_the_padding_of_tensorflow(world: Path) -> None:
    task = prepare(world, parquet(world), "mobilenet")
    assert load_config(world / "mobilenet").tf_padding
    network, head = task.load_model(0, "fp32", CPU)
    pixels = task.batch(np.arange(4), CPU)["pixel_values"]
    with torch.no_grad():
        expected = network.eval()(pixel_values=pixels).logits
        installed = LoRA(rank=2).install(network, head, 0)
        assert any(value.shape[1] == 27 for value in installed.parameters.values())  # the first convolution, 3 x 3 x 3
        found = installed.model.eval()(pixel_values=pixels).logits
    torch.testing.assert_close(found, expected)


def load_config(folder: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(folder)


# ---- real pictures


@pytest.mark.slow
@pytest.mark.parametrize(("tuning", "rate"), [(HeadOnly(), 3e-3), (LoRA(rank=8), 1e-3)], ids=["head", "lora"])
def test_a_real_model_learns_from_real_pictures(tuning: Tuning, rate: float) -> None:
    source = Files(
        train=str(shared("data/cifar10_jpeg.test.parquet")), test=str(shared("data/cifar10_jpeg.test.parquet"))
    )
    model = Model(path=str(shared("models/mobilenet_v2_1.0_224")))
    task = ImageClassification(size=64).prepare(model, source)
    assert task.label_names[:2] == ["airplane", "automobile"]
    network, head = task.load_model(0, "fp32", CPU)
    installed = tuning.install(network.eval(), head, 0)
    torch.manual_seed(0)
    for name, value in installed.parameters.items():
        if name.endswith("lora_A"):
            nn.init.kaiming_uniform_(value, a=5**0.5)
    optimizer = torch.optim.Adam(installed.parameters.values(), rate)
    for first in range(0, 640, 32):
        loss = task.loss(installed.model, task.batch(np.arange(first, first + 32), CPU))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        installed.refresh()
    with torch.inference_mode():
        assert task.evaluate(installed.model, np.arange(1000, 1200), "test", CPU).metrics["accuracy"] > 0.4
