from __future__ import annotations

import threading

import torch

from camserve.server.engine.hooks import plain_attention


def test_one_thread_does_not_turn_fused_attention_on_for_another():
    """A model is loaded in one thread while another one serves: the switch is put back when the last one has done with it."""
    is_inside, may_leave = threading.Event(), threading.Event()

    def load():
        with plain_attention():
            is_inside.set()
            assert may_leave.wait(120)

    before = torch.backends.mha.get_fastpath_enabled()
    thread = threading.Thread(target=load)
    with plain_attention():
        thread.start()
        assert is_inside.wait(120)
    try:
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        may_leave.set()
        thread.join()
    assert before is torch.backends.mha.get_fastpath_enabled()
