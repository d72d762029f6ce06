import pytest


@pytest.fixture(autouse=True)
def _without_latency(monkeypatch):
    """`ExtractStructure` times every layer, which takes seconds; tests/test_report.py looks at that."""
    monkeypatch.setattr("lowrank_pl.report.BATCHES", ())
