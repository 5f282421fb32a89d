"""The page "Drop-in" runs as it stands."""

from __future__ import annotations

import re

import pages

PAGE = "docs/drop-in.md"


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = pages.run(PAGE)
    assert page.adv_images.shape == page.x_adv.shape == page.images.shape
    assert page.success.shape == (3, 8) and page.robust_accuracy.shape == (3,)
    assert len(page.adversarial.dataset) == 8 and page.metric.total == 8


def test_every_class_is_listed():
    from pyadv.compat import torchattacks

    text = (pages.ROOT / PAGE).read_text()
    for name in (*torchattacks.__all__, *torchattacks._NEAREST):
        assert re.search(rf"\b{name}\b", text), name
