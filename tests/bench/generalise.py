"""Learns from 2,000 synthetic photos in 30 CPU-minutes, scored on 200 unseen ones, beside stock fine-tuning.

Both train the same tiny model on the same records for the same CPU time: ours through the real entries (packed or
padded as the config says, five rates, detection head); the peer by plain transformers.Trainer, padded, one rate, the
answer alone. BBU_BENCH_STEPS (ours), BBU_BENCH_CPU_MINUTES (the peer) and BBU_BENCH_PHOTOS make it smaller,
BBU_BENCH_FOLDER keeps the files.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tabulate import tabulate

from tests.commands import ROOT, Demo, argv_of, call_well, make_demo

PHOTOS, VAL_RATIO, SEED = int(os.environ.get("BBU_BENCH_PHOTOS", "2200")), 0.0909, 11
SPLIT = "split_seed=7"
"""A site has four photos: under this seed exactly 50 of 550 sites are held out."""
MINUTES = float(os.environ.get("BBU_BENCH_CPU_MINUTES", "30"))
STEPS = int(os.environ.get("BBU_BENCH_STEPS", "2300"))
COMMON = ("teacher_ratio=0.0", "generation_max_new_tokens=320",
          "generation_batch_size=40", "cpu_threads=1")  # fmt: skip
OURS = (
    "detection_enabled=true", "detection_num_queries=40", "detection_hidden_dim=128", "detection_num_layers=3",
    "detection_num_heads=4", "detection_ffn_dim=256", "detection_adapter_dim=128", "detection_dropout=0.0",
    "detection_caption_dropout=0.0", "detection_caption_max_length=24", "detection_denoising_queries=40",
    "detection_score_threshold=0.4",
    f"max_steps={STEPS}", f"save_steps={STEPS // 4}", "save_total_limit=0", "per_device_train_batch_size=8",
    "vision_lr=1e-3", "merger_lr=1e-3", "llm_lr=1.5e-3", "detection_lr=1e-3", "adapter_lr=1e-3",
    "adam_beta2=0.99", "warmup_steps=50", "logging_steps=50", "log_weight_norms=false", "log_grad_norms=false",
)  # fmt: skip


def run() -> str:
    folder = os.environ.get("BBU_BENCH_FOLDER") or tempfile.mkdtemp()
    root = Path(folder)
    demo = Demo(root) if (root / "model").exists() else make_demo(root, PHOTOS, SEED, f"val_ratio={VAL_RATIO}", SPLIT)
    counts = {name: len((root / "data" / name).read_text().splitlines()) for name in ("train.jsonl", "val.jsonl")}
    ours = train_ours(demo)
    rows = score_checkpoints(demo, "ours")
    peer = train_peer(demo)
    rows.append(["stock SFT", "answer", f"{peer:.1f}", *score_peer(demo)])
    head = (
        f"{counts['train.jsonl']} photos to learn from, {counts['val.jsonl']} unseen; ours took {ours:.1f} CPU-minutes"
    )
    names = ["run", "source", "CPU-min", "precision", "recall", "F1 class-aware", "F1 boxes"]
    return f"{head}\n{tabulate(rows, headers=names, floatfmt='.3f')}"


def measure_cpu_minutes(argv: list[str]) -> float:
    """Run a command and return the CPU time of it and its children, in minutes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(argv, cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60


def train_ours(demo: Demo) -> float:
    settings = [*COMMON, *OURS, *demo.settings, f"output_root={demo.root}", "run_name=ours"]
    return measure_cpu_minutes(argv_of("train", ("--config", "smoke"), settings))


def score_checkpoints(demo: Demo, name: str) -> list[list]:
    """Score every checkpoint of a run; a row for each of them and each source."""
    run = demo.root / f"output-{name}"
    call_well("eval", arguments=("--pending", str(run)))
    rows = []
    for path in run.glob("eval/checkpoint-*/*/metrics.json"):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        rows.append([metrics["step"], metrics["source"], metrics])
    return [
        [f"ours, step {step}", source, "", *select_figures(metrics)]
        for step, source, metrics in sorted(rows, key=lambda r: r[:2])
    ]


def select_figures(metrics: dict) -> list[float]:
    """Precision, recall and F1 with the right label, and F1 of the boxes alone, at IoU 0.5."""
    aware, boxes = metrics["detection"]["class_aware"], metrics["detection"]["class_agnostic"]
    return [aware["precision@0.50"], aware["recall@0.50"], aware["f1@0.50"], boxes["f1@0.50"]]


def train_peer(demo: Demo) -> float:
    argv = [sys.executable, "-m", "tests.bench._stock_sft", str(demo.root), str(MINUTES), *COMMON, *demo.settings]
    return measure_cpu_minutes(argv)


def score_peer(demo: Demo) -> list[float]:
    metrics = json.loads((demo.root / "stock" / "metrics.json").read_text(encoding="utf-8"))
    return select_figures(metrics)
