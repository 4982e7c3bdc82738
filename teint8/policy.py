"""Policy: which calls run in INT8, and how. Frozen data: it is matched by ``teint8.transforms`` and changes nothing."""

import dataclasses
import json
from typing import Any, Literal

OPS = ("linear", "matmul", "activation_matmul", "conv", "embedding", "recurrent", "attention", "norm")
"""Names a rule may give in ``ops``: ``linear`` (F.linear and the projections of attention), ``matmul`` (torch.matmul, mm, bmm,
addmm, baddbmm with a weight operand), ``activation_matmul`` (the same between two activations), ``conv`` (F.conv1d to conv3d and the
transposed ones); and, only where a rule names them, ``embedding`` (F.embedding and embedding_bag), ``recurrent`` (nn.LSTM, nn.GRU and
nn.RNN, step by step), ``attention`` (F.scaled_dot_product_attention, also that of nn.MultiheadAttention) and ``norm`` (F.layer_norm
and F.rms_norm in teint8's form, the same bits on every device, whose codes are made in the same kernel and wait for the linear)."""


def _one_of(owner: str, field: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}: {field} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


@dataclasses.dataclass(frozen=True)
class Quant:
    """How one operand is quantized.

    Attributes:
        granularity: "row" gives a scale to each token of an activation (in a convolution each sample), each output channel of a
            weight; "tensor" gives one scale to the whole operand; "block" gives one to each ``block`` values of a row along K, for
            linears and matmuls by a weight of two dimensions.
        scale: "dynamic" takes it from the values at hand; "static" from the packed weight
            (``QTensor.with_activation_scale``), for activations only.
        rounding: "nearest" (ties to even) or "stochastic" (unbiased, for gradients only).
        block: 32, 64 or 128, for granularity="block".

    Raises:
        ValueError: a value that is not one of these.

    Examples:
        >>> Quant(rounding="stochastic")
        Quant(rounding='stochastic')

    """

    granularity: Literal["row", "tensor", "block"] = "row"
    scale: Literal["dynamic", "static"] = "dynamic"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    block: int = 128

    @property
    def grouping(self) -> str:
        """The granularity in one word: "row", "tensor", "block32", "block64" or "block128"."""
        return f"block{self.block}" if self.granularity == "block" else self.granularity

    def __post_init__(self) -> None:
        _one_of("Quant", "granularity", self.granularity, ("row", "tensor", "block"))
        _one_of("Quant", "block", self.block, (32, 64, 128))
        _one_of("Quant", "scale", self.scale, ("dynamic", "static"))
        _one_of("Quant", "rounding", self.rounding, ("nearest", "stochastic"))
        if self.block != 128 and self.granularity != "block":
            raise ValueError(
                f"Quant: block={self.block} has no meaning with granularity={self.granularity!r}; Quant('block', block={self.block})"
            )

    def __repr__(self) -> str:
        return _repr(self)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the calls whose weight has a path that ``path`` matches.

    Attributes:
        path: a glob over the weight's path in the params ("encoder.layers.0.linear1.weight") or its module's; ``*`` stands for any
            run of characters, dots included.
        ops: names from ``teint8.policy.OPS``; activations are multiplied with each other in INT8 only by a rule that names
            "activation_matmul"; tables, whole recurrent layers and attention's own products are INT8 only by one that names
            "embedding", "recurrent", "attention" (whose path is "file.py:line" of the call) or "norm".
        weight: Quant of the weight, or None to leave the call in float.
        activation: Quant of the activation, or None for a float activation (W8A16).
        gradient: Quant of the output's gradient for an INT8 backward, or None for a float backward. That of attention, norms and
            tables is float in either case.
        wgrad: with a gradient, whether the weight's gradient is computed in "int8" too or in "float" (SwitchBack).
        compute: "int8" runs INT8 kernels, "simulate" plain torch with the same bits.

    Raises:
        TypeError: a field of another type.
        ValueError: a combination that has no meaning; the message names the fix.

    Examples:
        >>> Rule("*.lm_head.*", weight=None)
        Rule('*.lm_head.*', weight=None)

    """

    path: str = "*"
    ops: tuple[str, ...] = ("linear", "matmul", "conv")
    weight: Quant | None = Quant()
    activation: Quant | None = Quant()
    gradient: Quant | None = None
    wgrad: Literal["int8", "float"] = "int8"
    compute: Literal["int8", "simulate"] = "int8"

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise TypeError(f"Rule: path is {self.path!r}; a non-empty glob such as 'encoder.*' is needed")
        if isinstance(self.ops, str) or not isinstance(self.ops, tuple):
            raise TypeError(f"Rule: ops is {self.ops!r}; a tuple of names is needed, such as ('linear',)")
        if not self.ops:
            raise ValueError(f"Rule: ops is (), so that it would be for no call; names such as {OPS[0]!r} are needed, or no such rule")
        for op in self.ops:
            _one_of("Rule", "ops", op, OPS)
        for field in ("weight", "activation", "gradient"):
            value = getattr(self, field)
            if value is not None and not isinstance(value, Quant):
                raise TypeError(f"Rule: {field} is {value!r}; Quant(...) or None is needed")
        _one_of("Rule", "wgrad", self.wgrad, ("int8", "float"))
        _one_of("Rule", "compute", self.compute, ("int8", "simulate"))
        self._check_combination()
        self._check_blocks()

    def _check_combination(self) -> None:
        for field, value in (("weight", self.weight), ("gradient", self.gradient)):
            if value is not None and value.scale == "static":
                raise ValueError(f"Rule: {field}=Quant(scale='static') has no meaning; only activations have static scales")
        for field, value in (("weight", self.weight), ("activation", self.activation)):
            if value is not None and value.rounding == "stochastic":
                raise ValueError(f"Rule: {field}=Quant(rounding='stochastic') would break train = serve; only gradients are rounded so")
        if self.gradient is not None and self.gradient.granularity == "tensor":
            raise ValueError(f"Rule: gradient={self.gradient!r}; gradients are quantized by row or block: Quant(granularity='row')")
        if self.gradient is not None and self.activation is None:
            raise ValueError("Rule: gradient is given but activation is None; an INT8 backward needs INT8 activations")
        if self.gradient is None and self.wgrad == "float":
            raise ValueError(
                "Rule: wgrad='float' has no meaning without a gradient, for the whole backward is float; add gradient=Quant()"
            )

    def _check_blocks(self) -> None:
        blocks = {q.block for q in (self.weight, self.activation, self.gradient) if q is not None and q.granularity == "block"}
        if len(blocks) > 1:
            raise ValueError(f"Rule: blocks of {' and '.join(map(str, sorted(blocks)))} values; one size is needed for all operands")
        if self.gradient is not None and self.gradient.granularity == "block" and not self._has_blocks():
            raise ValueError("Rule: gradient is by block, but neither weight nor activation is; give one of them the same blocks")
        if self.gradient is not None and self.gradient.rounding == "stochastic" and self._has_blocks():
            raise ValueError("Rule: stochastic rounding has no blocks; use Quant(granularity='row', rounding='stochastic'), or nearest")
        if self.activation is not None and self.activation.granularity == "block" and self.activation.scale == "static":
            raise ValueError("Rule: activation=Quant('block', 'static') has no meaning; a static scale is one for all")

    def _has_blocks(self) -> bool:
        return any(quant is not None and quant.granularity == "block" for quant in (self.weight, self.activation))

    def matches(self, path: str, op: str) -> bool:
        """Whether this rule is for a call.

        Args:
            path: the weight's path in the params.
            op: one of ``teint8.policy.OPS``.

        Returns:
            A bool.

        """
        return op in self.ops and (glob(self.path, path) or glob(self.path, path.rpartition(".")[0]))

    def __repr__(self) -> str:
        return _repr(self, positional="path")


def _known(kind: type, fields: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(fields) - set(names))
    if unknown:
        raise ValueError(f"Policy.from_json: {kind.__name__} has no field {unknown[0]!r}; it has {', '.join(names)}")
    return fields


@dataclasses.dataclass(frozen=True)
class Policy:
    """Rules in order: the first that matches decides, and a call that none matches stays float.

    Attributes:
        rules: Rules, kept as a tuple.

    Raises:
        TypeError: an item that is no Rule.

    Examples:
        >>> policy = Policy([Rule("*.out_proj.*", weight=None), *Policy.qat().rules])
        >>> policy
        Policy([
            Rule('*.out_proj.*', weight=None),
            Rule('*'),
        ])
        >>> policy.match("layers.0.out_proj.weight", "linear")
        Rule('*.out_proj.*', weight=None)

    """

    rules: tuple[Rule, ...]

    def __init__(self, rules: Any = ()) -> None:
        if isinstance(rules, Rule):
            raise TypeError("Policy: a Rule was given; a list of rules is needed: Policy([Rule(...)])")
        try:
            rules = tuple(rules)
        except TypeError:
            raise TypeError(f"Policy: rules is {rules!r}; a list of Rule is needed") from None
        for rule in rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"Policy: {rule!r} is not a Rule; write Rule(path, ...)")
        object.__setattr__(self, "rules", rules)

    def match(self, path: str, op: str) -> Rule | None:
        """The rule that decides.

        Args:
            path: the weight's path in the params.
            op: one of ``teint8.policy.OPS``.

        Returns:
            The first Rule that matches, or None.

        """
        for rule in self.rules:
            if rule.matches(path, op):
                return rule
        return None

    @staticmethod
    def qat() -> "Policy":
        """W8A8 forward, float backward through the straight-through estimator: the default."""
        return Policy([Rule()])

    @staticmethod
    def training() -> "Policy":
        """INT8 forward, dX and dW, all rounded to nearest: deterministic. ``Quant(rounding="stochastic")`` is yours to ask for."""
        return Policy([Rule(gradient=Quant())])

    @staticmethod
    def switchback() -> "Policy":
        """INT8 forward and dX, float dW (Wortsman et al., 2023)."""
        return Policy([Rule(gradient=Quant(), wgrad="float")])

    @staticmethod
    def weight_only() -> "Policy":
        """W8A16: INT8 weights, float activations."""
        return Policy([Rule(activation=None)])

    @staticmethod
    def simulate() -> "Policy":
        """``qat()`` in plain torch on every device, with the same bits."""
        return Policy([Rule(compute="simulate")])

    @staticmethod
    def preset(name: str) -> "Policy":
        """A preset by its name.

        Args:
            name: "qat", "training", "switchback", "weight_only" or "simulate".

        Returns:
            The Policy.

        Raises:
            ValueError: an unknown name; the message lists the known ones.

        """
        presets = ("qat", "training", "switchback", "weight_only", "simulate")
        _one_of("Policy.preset", "name", name, presets)
        policy: Policy = getattr(Policy, name)()
        return policy

    def to_json(self) -> str:
        """The rules as JSON, which ``from_json`` reads.

        Examples:
            >>> Policy.from_json(Policy.training().to_json()) == Policy.training()
            True

        """
        return json.dumps([dataclasses.asdict(rule) for rule in self.rules])

    @staticmethod
    def from_json(text: str) -> "Policy":
        """The policy that ``to_json`` wrote.

        Args:
            text: JSON, a list of rules.

        Returns:
            The Policy.

        Raises:
            ValueError: not JSON, no list of rules, or a field that a rule does not have.

        """
        try:
            rules = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Policy.from_json: {text[:60]!r} is no JSON ({error}); Policy.to_json writes it") from None
        if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
            raise ValueError(f"Policy.from_json: {text[:60]!r}; a list of rules is needed, as Policy.to_json writes it")
        quants = ("weight", "activation", "gradient")
        made = []
        for rule in rules:
            fields: dict[str, Any] = {**_known(Rule, rule), **({"ops": tuple(rule["ops"])} if "ops" in rule else {})}
            fields |= {key: Quant(**_known(Quant, fields[key])) for key in quants if isinstance(fields.get(key), dict)}
            made.append(Rule(**fields))
        return Policy(made)

    def __repr__(self) -> str:
        return "Policy([" + "".join(f"\n    {rule!r}," for rule in self.rules) + ("\n])" if self.rules else "])")


def shown(value: object) -> str:
    """A value for an error's message: its repr, or where that is long (a dict of tensors, a model) its type."""
    text = repr(value)
    return text if len(text) <= 200 else f"of type {type(value).__name__}"


def glob(pattern: str, path: str) -> bool:
    """Whether ``pattern`` matches the whole of ``path``; ``*`` stands for any run of characters.

    Plain string methods, which Dynamo can trace, unlike ``fnmatch``.

    Examples:
        >>> glob("encoder.*.weight", "encoder.layers.0.linear1.weight"), glob("head", "head.bias")
        (True, False)

    """
    first, *rest = pattern.split("*")
    if not rest:
        return path == pattern
    if not path.startswith(first):
        return False
    at = len(first)
    for part in rest[:-1]:
        found = path.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return len(path) - at >= len(rest[-1]) and path.endswith(rest[-1])


def _repr(data: Any, positional: str = "") -> str:
    """Only what differs from the defaults: a policy of ten rules should read as ten short lines."""
    shown = [repr(getattr(data, positional))] if positional else []
    for field in dataclasses.fields(data):
        value = getattr(data, field.name)
        if field.name != positional and value != field.default:
            shown.append(f"{field.name}={value!r}")
    return f"{type(data).__name__}({', '.join(shown)})"
