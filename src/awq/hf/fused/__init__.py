"""What takes the place of modules when a model is fused for decoding, and the proofs that it may.

`decoding` does for blocks or their attention, `expert_decoding` for layers of experts, `norms` for norms,
`attention` and `grouped` for attention itself; `room` is a cache with room to spare.
"""
