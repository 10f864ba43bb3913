import io

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from bbu.data.dataset import SampleBuilder, load_dataset
from bbu.data.prompts import get_prompt
from bbu.errors import DataError
from bbu.schema import IGNORE_INDEX
from tests.data.conftest import view, write_jpeg, write_jsonl


@pytest.fixture
def load(make_config, tokenizer, processor):
    def build(split="train", seed=1, max_length=4096, **changes):
        config = make_config(**changes)
        return load_dataset(config, tokenizer, processor, split=split, seed=seed, max_length=max_length)

    return build


def teacher_images(dataset):
    return [[t.images[0] for t in dataset.teachers(i)] for i in range(len(dataset))]


def test_a_sample_holds_teacher_then_student(load, tokenizer):
    sample = load(teacher_ratio=1.0)[0]
    assert [s.role for s in sample.answers] == [s.role for s in sample.images] == ["teacher", "student"]
    text = tokenizer.decode(sample.labels[sample.labels != IGNORE_INDEX])
    assert text == (
        '[{"bbox_2d": [5, 5, 20, 20], "desc": "挡风板/已安装"}]<|im_end|>'
        '[{"bbox_2d": [10, 10, 30, 30], "desc": "螺丝连接点/BBU安装螺丝/安装正确"}, '
        '{"bbox_2d": [50, 40, 80, 70], "desc": "螺丝连接点/BBU安装螺丝/安装正确"}]<|im_end|>'
    )


def test_pixels_grid_and_placeholders_agree(load):
    sample = load(teacher_ratio=1.0)[0]
    assert sample.image_grid_thw.tolist() == [[1, 6, 8], [1, 6, 8]]
    assert sample.pixel_values.shape == (96, 3 * 2 * 14 * 14)
    assert int(sample.mm_token_type_ids.sum()) == 24
    assert sample.image_size == (112, 84)


def test_source_order_keeps_the_records_order(load):
    assert [o.bbox_2d[0] for o in load(object_order="source")[0].objects] == [50, 10]


def test_a_photo_resized_once_more_takes_its_boxes_along(load):
    sample = load(max_pixels=28 * 28 * 4)[0]
    assert sample.image_size == (56, 28)
    assert sample.objects[0].bbox_2d == (5.0, pytest.approx(10 / 3), 15.0, 10.0)


def test_teacher_ratio_is_the_share_of_samples_with_teachers(load):
    assert all(not t for t in teacher_images(load(teacher_ratio=0.0)))
    assert all(len(t) == 2 for t in teacher_images(load(teacher_ratio=1.0, num_teacher_samples=2)))
    dataset, drawn = load(teacher_ratio=0.7), 0
    for epoch in range(250):
        dataset.set_epoch(epoch)
        drawn += sum(bool(t) for t in teacher_images(dataset))
    assert drawn / 1000 == pytest.approx(0.7, abs=0.05)


def test_teachers_depend_on_seed_epoch_and_index_alone(load):
    def draws(dataset, order):
        seen = {}
        for epoch in order:
            dataset.set_epoch(epoch)
            seen[epoch] = teacher_images(dataset)
        return seen

    forward = draws(load(), range(5))
    assert draws(load(), reversed(range(5))) == forward
    assert len({str(v) for v in forward.values()}) > 1
    assert draws(load(seed=2), range(5)) != forward


def test_persistent_workers_see_the_epoch(load):
    dataset = load()
    loader = DataLoader(dataset, 1, num_workers=1, persistent_workers=True, collate_fn=lambda b: len(b[0]))
    for epoch in range(4):
        dataset.set_epoch(epoch)
        assert list(loader) == [dataset.cost(i, epoch).tokens for i in range(len(dataset))]


def test_a_student_is_never_its_own_teacher(load, data_root):
    write_jsonl(data_root / "teacher.jsonl", [view("images/s0.jpg", (1, 1, 9, 9)), view("images/t0.jpg")])
    dataset = load(teacher_ratio=1.0, num_teacher_samples=2)
    assert teacher_images(dataset)[0] == ["images/t0.jpg"]


def test_a_records_own_teachers_are_used_as_they_are(load, data_root):
    record = {"teachers": [view("images/t2.jpg"), view("images/t1.jpg")], "student": view("images/s0.jpg")}
    write_jsonl(data_root / "train.jsonl", [record])
    assert teacher_images(load(teacher_ratio=0.0)) == [["images/t2.jpg", "images/t1.jpg"]]


def test_evaluation_has_its_own_file_prompt_and_ratio(load, tokenizer):
    dataset = load("eval", teacher_ratio=1.0, eval_prompt="concise")
    assert len(dataset) == 2
    assert get_prompt("zh", "concise").system in tokenizer.decode(dataset[0].input_ids)
    assert teacher_images(dataset) == [[], []]


def test_max_examples_limits_the_records(load):
    assert len(load(max_examples=3)) == 3


def test_measured_length_is_the_built_length(load):
    dataset = load(teacher_ratio=1.0)
    assert dataset.cost(0, epoch=0).tokens == len(dataset[0])


def test_teachers_give_way_where_the_length_is_short(load):
    alone = len(load(teacher_ratio=0.0)[0])
    sample = load(teacher_ratio=1.0, max_length=alone + 10)[0]
    assert len(sample) == alone


def test_a_student_over_the_length_is_refused_or_dropped_by_name(load, caplog):
    with pytest.raises(DataError, match=r"train.jsonl\[0\] images/s0.jpg \(\d+ tokens\)"):
        load(max_length=50)
    with caplog.at_level("WARNING"):
        assert len(load("eval", max_length=50, long_sample_policy="drop")) == 0
    assert "dropped 2 samples" in caplog.text


def test_an_object_free_photo_answers_with_an_empty_list(load, data_root, tokenizer):
    write_jsonl(data_root / "train.jsonl", [view("images/s0.jpg")])
    sample = load(teacher_ratio=0.0)[0]
    assert tokenizer.decode(sample.labels[sample.labels != IGNORE_INDEX]) == "[]<|im_end|>"


def test_a_question_is_the_prefix_of_the_trained_conversation(make_config, tokenizer, processor, load, data_root):
    sample = load(teacher_ratio=0.0)[0]
    builder = SampleBuilder(make_config(), tokenizer, processor, get_prompt("zh", "detailed"))
    question = builder.build_question("photo", [Image.open(data_root / "images/s0.jpg")])
    assert torch.equal(question.input_ids, sample.input_ids[: sample.answers[0].start])
    assert torch.equal(question.pixel_values, sample.pixel_values)


def test_a_question_about_an_image_that_no_model_takes_names_it(make_config, tokenizer, processor):
    builder = SampleBuilder(make_config(), tokenizer, processor, get_prompt("zh", "detailed"))
    with pytest.raises(DataError, match=r"photos/cable\.png: .*more elongated"):
        builder.build_question("photos/cable.png", [Image.new("RGB", (1000, 2))])


def test_a_missing_photo_is_named(load, data_root):
    (data_root / "images/s1.jpg").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl: 1 images are missing, for example images/s1.jpg \(line 2\)"):
        load()


@pytest.mark.parametrize("name", ["train.jsonl", "val.jsonl", "teacher.jsonl"])
def test_a_file_in_another_encoding_is_named_with_its_line(load, data_root, name):
    text = (data_root / name).read_text(encoding="utf-8")
    (data_root / name).write_text(text, encoding="gbk")
    with pytest.raises(DataError, match=rf"{name}:1: not UTF-8"):
        load("eval" if name == "val.jsonl" else "train", teacher_ratio=1.0)


def test_a_photo_listed_twice_is_trained_on_twice_but_never_scored_twice(load, data_root):
    for name in ("train.jsonl", "val.jsonl"):
        write_jsonl(data_root / name, [view("images/s0.jpg"), view("images/./s0.jpg")])
    assert len(load()) == 2
    with pytest.raises(DataError, match=r"val\.jsonl:2: .* listed in line 1 already"):
        load("eval")


def test_an_image_that_no_model_takes_is_named_with_its_record(load, data_root):
    write_jsonl(data_root / "train.jsonl", [view("images/s0.jpg") | {"width": 6000, "height": 20}])
    with pytest.raises(DataError, match=r"train\.jsonl\[0\] images/s0\.jpg: .*more elongated"):
        load()


def test_a_photo_that_vanishes_later_is_named_with_its_sample(load, data_root):
    dataset = load()
    (data_root / "images/s1.jpg").unlink()
    with pytest.raises(DataError, match=r"train.jsonl\[1\] images/s1.jpg: no image .*s1.jpg"):
        dataset[1]


def test_a_truncated_photo_is_named(load, data_root):
    buffer = io.BytesIO()
    Image.effect_noise((112, 84), 80).convert("RGB").save(buffer, "JPEG")
    (data_root / "images/s1.jpg").write_bytes(buffer.getvalue()[:-600])
    with pytest.raises(DataError, match=r"images/s1.jpg: cannot decode"):
        load()[1]


def test_a_photo_of_another_size_than_its_record_is_refused(load, data_root):
    write_jpeg(data_root / "images/s0.jpg", 84, 112)
    with pytest.raises(DataError, match="84x112 pixels but the record says 112x84"):
        load()[0]


def test_a_box_outside_a_photo_without_recorded_size_is_refused(load, data_root):
    record = view("images/s0.jpg", (10, 10, 113, 20))
    del record["width"], record["height"]
    write_jsonl(data_root / "train.jsonl", [record])
    with pytest.raises(DataError, match="leaves the 112x84 image"):
        load()


def test_no_record_at_all_is_refused(load, data_root):
    write_jsonl(data_root / "train.jsonl", [])
    with pytest.raises(DataError, match="no record to train on"):
        load()
    write_jsonl(data_root / "val.jsonl", [])
    with pytest.raises(DataError, match="no record to validate on"):
        load("eval")
