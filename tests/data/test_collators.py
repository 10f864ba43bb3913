import pytest
import torch

from bbu.data.collators import StandardDataCollator
from bbu.data.dataset import load_dataset
from bbu.schema import IGNORE_INDEX
from tests.data.conftest import view, write_jsonl


@pytest.fixture
def samples(make_config, tokenizer, processor, data_root):
    records = [
        {"teachers": [view("images/t0.jpg", (0, 0, 28, 28))], "student": view("images/s0.jpg", (28, 21, 84, 63))},
        view("images/s1.jpg"),
    ]
    write_jsonl(data_root / "train.jsonl", records)
    config = make_config(teacher_ratio=0.0)
    dataset = load_dataset(config, tokenizer, processor, split="train", seed=0, max_length=4096)
    return [dataset[0], dataset[1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_holds_every_sample_unchanged_between_padding(samples, side):
    batch = StandardDataCollator(7, pad_to_multiple_of=16, side=side)(samples)
    assert batch["input_ids"].shape[1] % 16 == 0
    for row, sample in enumerate(samples):
        real = batch["attention_mask"][row].bool()
        edge = real[-len(sample) :] if side == "left" else real[: len(sample)]
        assert edge.all() and int(real.sum()) == len(sample)
        for key in ("input_ids", "labels", "mm_token_type_ids"):
            assert torch.equal(batch[key][row][real], getattr(sample, key))
        assert (batch["input_ids"][row][~real] == 7).all()
        assert (batch["labels"][row][~real] == IGNORE_INDEX).all()


def test_images_follow_one_another_in_sample_order(samples):
    batch = StandardDataCollator(0)(samples)
    assert batch["image_grid_thw"].shape == (3, 3)
    assert torch.equal(batch["pixel_values"], torch.cat([s.pixel_values for s in samples]))


def test_roles_cover_exactly_the_labels_and_tell_teacher_from_student(samples):
    batch = StandardDataCollator(0)(samples)
    assert torch.equal(batch["answer_roles"] > 0, batch["labels"] != IGNORE_INDEX)
    assert [sorted(set(row.tolist())) for row in batch["answer_roles"]] == [[0, 1, 2], [0, 2]]


def test_the_head_sees_the_students_image_and_instruction_alone(samples, tokenizer):
    batch = StandardDataCollator(0)(samples)
    assert batch["student_images"].tolist() == [1, 2]  # image 0 is the teacher's
    for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True):
        text = tokenizer.decode(ids[mask])
        assert "请检测照片中的所有部件" in text and "image_pad" not in text and "bbox_2d" not in text
        assert text.endswith("<|im_start|>assistant\n")


def test_captions_are_the_descriptions_in_order_with_their_end(samples, tokenizer):
    batch = StandardDataCollator(0)(samples)
    (caption,) = batch["caption_ids"]
    assert tokenizer.decode(caption[caption != IGNORE_INDEX]) == "螺丝连接点/BBU安装螺丝/安装正确<|im_end|>"
    assert StandardDataCollator(0)(samples[1:])["caption_ids"].shape == (0, 1)


def test_boxes_are_centre_and_size_as_shares_of_the_students_image(samples):
    batch = StandardDataCollator(0)(samples)
    torch.testing.assert_close(batch["boxes"][0], torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    assert batch["boxes"][1].shape == (0, 4)
