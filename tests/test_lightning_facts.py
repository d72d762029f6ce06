"""Facts about Lightning and PyTorch that the callbacks rely on; a newer release may change one."""

import contextlib

import pytest
import pytorch_lightning as pl
import torch
from nets import EPOCH, Module, Net, TwoOptimizers, loader, quiet_trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

HOOKS = [
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_end",
    "on_fit_end",
    "on_exception",
    "load_state_dict",
    "on_load_checkpoint",
    "on_save_checkpoint",
    "teardown",
]


class Hooks(pl.Callback):
    """Notes the order of hooks, and what each saw."""

    def __init__(self):
        self.order, self.seen = [], {}

    def state_dict(self):
        return {"plain": [1, 2.0, "x", None, {"a": torch.ones(1)}]}


def _noting(name):
    def hook(self, *args, **kwargs):
        self.order.append(name)
        if args and isinstance(args[0], pl.Trainer):
            self.seen[name] = (args[0].ckpt_path, args[0].global_step, len(args[0].optimizers))

    return hook


for _name in HOOKS:
    setattr(Hooks, _name, _noting(_name))


class Spoken(Module):
    """A module that notes its own hooks in the callback's list."""

    def __init__(self, order):
        super().__init__()
        self.order = order

    def training_step(self, batch, batch_idx):
        self.order.append("training_step")
        return super().training_step(batch, batch_idx)

    def configure_gradient_clipping(self, *args, **kwargs):
        self.order.append("clipping")

    def load_state_dict(self, *args, **kwargs):
        self.order.append("weights loaded")
        return super().load_state_dict(*args, **kwargs)

    def configure_optimizers(self):
        self.order.append("configure_optimizers")
        return super().configure_optimizers()


def run(tmp_path, *callbacks, module=None, ckpt_path=None, **arguments):
    loop = quiet_trainer(
        tmp_path, *callbacks, enable_checkpointing=True, **{"max_epochs": 1, "limit_train_batches": 2} | arguments
    )
    loop.fit(Module() if module is None else module, loader(), loader(1), ckpt_path=ckpt_path, weights_only=True)
    return loop


def test_the_trainer_takes_the_name_log(tmp_path):
    hooks = Hooks()
    hooks.log = "mine"
    run(tmp_path, hooks)
    assert callable(hooks.log)


def test_order_within_a_step(tmp_path):
    """Fact 2: and `on_train_batch_end` fires for every micro-batch, also where no step was made."""
    hooks = Hooks()
    run(tmp_path, hooks, module=Spoken(hooks.order), accumulate_grad_batches=2)
    first = hooks.order.index("on_train_batch_start")
    assert hooks.order[first : hooks.order.index("on_validation_start", first)] == [
        "on_train_batch_start",
        "training_step",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_train_batch_end",
        "on_train_batch_start",
        "training_step",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "clipping",
        "on_train_batch_end",
    ]
    assert hooks.order[-3:] == ["on_train_end", "on_fit_end", "teardown"]


def test_order_when_resuming(tmp_path):
    """Fact 4."""
    run(tmp_path, Hooks(), ModelCheckpoint(tmp_path, filename="x"))
    hooks = Hooks()
    run(tmp_path, hooks, module=Spoken(hooks.order), ckpt_path=tmp_path / "x.ckpt", max_epochs=2)
    names = ["setup", "weights loaded", "load_state_dict", "configure_optimizers", "on_fit_start", "on_train_start"]
    positions = [hooks.order.index(name) for name in names]
    assert positions == sorted(positions)
    assert hooks.seen["setup"][0] is None  # ckpt_path
    assert hooks.seen["on_train_start"][1] == 2 + 2 or hooks.seen["on_train_start"][1] == 2


def test_a_finished_run_that_is_resumed_calls_no_training_hooks(tmp_path):
    run(tmp_path, Hooks(), ModelCheckpoint(tmp_path, filename="x"))
    hooks = Hooks()
    run(tmp_path, hooks, ckpt_path=tmp_path / "x.ckpt")
    assert not {"on_train_start", "on_train_end"} & set(hooks.order)
    assert "on_fit_end" in hooks.order


def test_epoch_hooks_that_a_checkpoint_at_the_last_batch_loses(tmp_path):
    """Fact 5: why everything goes by `global_step`."""
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run(tmp_path, Hooks(), save)
    hooks = Hooks()
    run(tmp_path, hooks, ckpt_path=tmp_path / "step=2.ckpt", max_epochs=2)
    assert hooks.order.count("on_train_epoch_end") == 1
    assert hooks.order.count("on_train_batch_end") == 2


def test_plain_callback_state_loads_with_weights_only(tmp_path):
    """Fact 6."""
    run(tmp_path, Hooks(), ModelCheckpoint(tmp_path, filename="x"))
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert next(v for k, v in state["callbacks"].items() if "Hooks" in k)["plain"][:4] == [1, 2.0, "x", None]


def test_model_checkpoint_comes_last(tmp_path):
    """Fact 9."""
    loop = quiet_trainer(tmp_path, ModelCheckpoint(tmp_path), Hooks(), enable_checkpointing=True)
    assert isinstance(loop.callbacks[-1], ModelCheckpoint)


def test_log_raises_when_training_has_ended(tmp_path):
    """Fact 13."""

    class Late(Module):
        def on_train_end(self):
            self.log("x", 1.0)

    with pytest.raises(Exception, match="log"):
        run(tmp_path, module=Late())


def test_an_interrupt_calls_on_exception_and_exits(tmp_path):
    """Fact 13."""

    class Interrupted(Module):
        def training_step(self, batch, batch_idx):
            raise KeyboardInterrupt

    hooks = Hooks()
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, hooks, module=Interrupted())
    assert stopped.value.code == 1
    assert "on_exception" in hooks.order
    assert not {"on_train_end", "on_fit_end"} & set(hooks.order)


def test_two_optimizers_advance_the_step_by_two(tmp_path):
    """Fact 13."""
    assert run(tmp_path, module=TwoOptimizers(), limit_train_batches=EPOCH).global_step == 2 * EPOCH


def test_no_callback_sees_the_closing_weights_before_the_last_checkpoint(tmp_path):
    """`ModelCheckpoint` writes at epoch and validation ends, before `on_train_end`."""
    hooks = Hooks()
    run(tmp_path, hooks, ModelCheckpoint(tmp_path))
    last = len(hooks.order) - hooks.order[::-1].index("on_save_checkpoint") - 1
    assert last < hooks.order.index("on_train_end")


def test_attention_never_calls_its_out_proj():
    """Fact 16."""
    attention, called = nn.MultiheadAttention(8, 2, batch_first=True), []
    attention.out_proj.register_forward_hook(lambda *_: called.append(1))
    attention(torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.ones(1, 2, 8))
    attention.eval()(torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.ones(1, 2, 8))
    assert not called


def test_compile_prefixes_names():
    """Fact 11."""
    compiled = torch.compile(Net(), backend="eager")
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())
    net = Net()
    net.compile(backend="eager")
    assert list(net.state_dict()) == list(Net().state_dict())


def test_a_copied_module_has_no_trainer(tmp_path):
    """`LightningModule.__getstate__` drops it: a copy that is to run a training step needs it given back."""
    import copy

    module = Module()
    loop = run(tmp_path, module=module)
    assert module._trainer is loop
    assert copy.deepcopy(module)._trainer is None


@pytest.mark.parametrize(("how", "counted"), [("foreach", True), ("single", True), ("fused", False), ("data", False)])
def test_not_every_write_is_counted(how, counted):
    """Fused optimizers and `p.data` leave `p._version` as it is: it cannot tell whether weights have changed."""
    p = nn.Parameter(torch.ones(3))
    p.grad, before = torch.ones(3), p._version
    if how == "data":
        p.data.add_(1)
    else:
        options = {} if how == "single" else {how: True}
        torch.optim.SGD([p], lr=0.1, **options).step()
    assert (p._version > before) == counted


def test_aliases_are_other_objects_with_the_same_memory():
    p = nn.Parameter(torch.ones(3))
    assert p.detach() is not p
    assert p.detach().data_ptr() == p.data_ptr()


def test_validation_runs_in_inference_mode_outside_of_a_fit(tmp_path):
    class Mode(Module):
        def on_validation_start(self):
            modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    modes, module = [], Mode()
    loop = run(tmp_path, module=module)
    loop.validate(module, loader(1), verbose=False)
    assert modes[-2:] == [(False, False), (True, False)]


def test_a_sanity_check_calls_validation_hooks(tmp_path):
    hooks = Hooks()
    with contextlib.suppress(RuntimeError):
        run(tmp_path, hooks)
    assert hooks.order.index("on_validation_start") < hooks.order.index("on_train_start")


def test_eigh_and_svd_have_no_half_kernels():
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(RuntimeError):
            torch.linalg.svd(torch.eye(3, dtype=dtype))


def test_a_convolution_without_channels_cannot_run():
    with pytest.raises((RuntimeError, ValueError)):
        nn.Conv2d(3, 0, 1)(torch.ones(1, 3, 2, 2))
