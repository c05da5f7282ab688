"""Names in emitted source: what it uses itself, and how a user's value is called beside it."""

from __future__ import annotations

import builtins

CLASSES = frozenset(dir(builtins)) | {
    "_Entmax15Root",
    "_Sparsemax",
    "_entmax15_threshold",
    "_sparsemax_threshold",
    "_autocast",
    "_autocasts",
    "_gelu",
    "_find_onednn",
    "_onednn",
    "_onednn_flops",
    "_mm",
    "_dense",
    "_over_rows",
    "_Product",
    "_chunks",
    "_traced",
}
"""Names that a class of the user's must not hide from the emitted code."""

LOCALS = frozenset(
    {
        "self",
        "torch",
        "flop_registry",
        "register_flop_formula",
        "triton",
        "tl",
        "nn",
        "F",
        "Tensor",
        "entmax15",
        "sparsemax",
        "top_k",
        "product_top_k",
        "sort_slots",
        "sort_slots_in_blocks",
        "grouped_matmul",
        "capacity_slots",
        "normalise",
        "unsort",
        "load_balance",
        "router_z_loss",
        "dropped_choices",
        "missed",
        "has_grouped_mm",
        "expert_loop",
        "outer_loop",
        "grouped_backward",
        "grouped_context",
        "register_grouped",
        "lead",
        "trained",
        "training",
        "momentum",
        "update",
        "mean",
        "var",
        "ctx",
        "inputs",
        "output",
        "operands",
        "needs",
        "keep",
        "tokens",
        "most",
        "extent",
        "at",
        "held",
        "kept",
        "number",
        "function",
        "call",
        "room",
        "_",
    }
)
"""Names that the emitted code uses itself; a value called so gets a trailing underscore."""

MODULE_ATTRIBUTES = frozenset(
    [
        "T_destination",
        "add_module",
        "apply",
        "bfloat16",
        "buffers",
        "call_super_init",
        "children",
        "compile",
        "cpu",
        "cuda",
        "diagnostics",
        "double",
        "dump_patches",
        "eval",
        "expert_coefficients",
        "extra_repr",
        "float",
        "forward",
        "freeze",
        "get_buffer",
        "get_extra_state",
        "get_parameter",
        "get_submodule",
        "half",
        "ipu",
        "load_state_dict",
        "modules",
        "mtia",
        "named_buffers",
        "named_children",
        "named_modules",
        "named_parameters",
        "parameters",
        "register_backward_hook",
        "register_buffer",
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_load_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_module",
        "register_parameter",
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
        "requires_grad_",
        "reset_parameters",
        "set_extra_state",
        "set_submodule",
        "share_memory",
        "state_dict",
        "to",
        "to_empty",
        "train",
        "training",
        "type",
        "xpu",
        "zero_grad",
    ]
)
"""Public attributes of `torch.nn.Module` and of the emitted class; a weight called so gets an underscore."""


def safe(name: str, taken: frozenset[str]) -> str:
    """`name`, or with one more underscore if it, or it without its last ones, is taken."""
    return name + "_" if name in taken or name.rstrip("_") in taken else name


def attribute(name: str) -> str:
    """The attribute of the emitted module that stores the value `name`."""
    return safe(name, MODULE_ATTRIBUTES)
