from __future__ import annotations

import pytest
from objective_parts import make_batch, make_net


@pytest.fixture
def net(device):
    return make_net().to(device)


@pytest.fixture
def batch(device):
    x, y = make_batch()
    return x.to(device), y.to(device)
