"""Methods that are a choice of what shares a scale, and of the levels between."""

from __future__ import annotations

from graphwright.ir.codecs.methods.method import Method, register_method

_NUQ = "nonuniform(bits={bits}, qnorm={two_bits})"

register_method(
    Method(
        name="kivi",
        summary="keys per channel, values per token, in groups of 32",
        source="KIVI, Liu et al. 2024, arXiv 2402.02750",
        keys="channel_range >> uniform(bits={bits})",
        values="token_range(group=32) >> uniform(bits={bits})",
        bits=(2, 4),
        default_bits=2,
        page=32,
        recent=96,
        note="at most 128 newest tokens in full precision, as there; keys leave it 32 at a time, not 128",
    )
)

register_method(
    Method(
        name="kvquant",
        summary="keys before rotary per channel, calibrated levels, 1% outliers aside",
        source="KVQuant, Hooper et al. 2024, arXiv 2401.18079",
        keys=f"outliers(fraction=0.01, axis=channel) >> channel_range >> {_NUQ}",
        values=f"outliers(fraction=0.01, axis=token) >> token_range >> {_NUQ}",
        bits=(2, 3, 4),
        default_bits=3,
        first=1,
        place="pre_rotary",
        note="ranges of keys come from their page and are stored with it, instead of from calibration; "
        "levels minimize the plain squared error, without the weights of a Fisher matrix",
    )
)

register_method(
    Method(
        name="kv_adaquant",
        summary="half as many bits for values as for keys",
        source="More for Keys, Less for Values, Hariri et al. 2025, arXiv 2502.15075",
        keys="token_range >> uniform(bits={bits})",
        values="token_range >> uniform(bits={half_bits})",
        bits=(4, 8),
        default_bits=4,
        note="bits are those of keys",
    )
)

register_method(
    Method(
        name="quantspec",
        summary="8 bits in two halves: a draft reads the upper 4 alone",
        source="QuantSpec, Tiwari et al. 2025, arXiv 2502.10424",
        keys="channel_range >> hierarchical(upper=4, lower=4)",
        values="token_range >> hierarchical(upper=4, lower=4)",
        bits=(8,),
        default_bits=8,
        page=128,
        recent=128,
        note="the drafter quantspec reads the upper half alone; weights stay as they are",
    )
)
