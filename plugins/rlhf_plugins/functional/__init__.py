"""The arithmetic of RLHF as pure functions of tensors: no config, no logging, no distributed call.

Layout: *ragged-flat*. Per-token tensors are flat, `[N]`, one response after another, with
`lengths: LongTensor [B]` and `N = lengths.sum()`. A mask is bool `[N]`: True where the policy produced
the token, False where a tool or an environment did; `None` stands for all True. Nothing is padded, so no
function can mistake padding for data, and a pad id that equals EOS cannot drop the EOS from a loss.

Letters: N response tokens in a batch, B responses, P preference pairs, T tokens of the longest response.
Log-probabilities are natural logarithms, in nats.
"""
