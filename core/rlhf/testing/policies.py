"""The contract of policies: `PolicyContract`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from rlhf.testing import parts
from rlhf.testing.contract import Contract, require

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.scores import Scores
    from rlhf.sequences import Sequences
    from rlhf.testing.kit import Kit, Work

_TEXT = "abc def"


class PolicyContract(Contract):
    """What a policy must keep: tokens that come back as text, log-probs that are a distribution's, whatever else is in
    the batch, and a model that is saved as it is.

    class TestMine(PolicyContract):
        name = "mine"

    Where it can't load the kit's model (a small Llama), `recipe` names another: {"model": "FOLDER"}.
    """

    kind = "policy"
    tolerance: ClassVar[float] = 1e-4
    """Nats by which a token's log-prob may differ where the batch is another: rounding of fp32."""

    def base(self, kit: Kit) -> dict[str, Any]:
        return {"algo": parts.IMITATE, "data": str(kit.once("data", kit.data))}

    def work(self, kit: Kit) -> Work:
        key = ("policy", self.name, repr(self.options), repr(self.recipe))
        found: Work = kit.once(key, lambda: kit.work(self.plan(kit)))
        return found

    def score(self, work: Work, sequences: Sequences, temperature: float = 1.0, entropy: bool = False) -> Scores:
        """Through the container, as a loss asks for it."""
        from rlhf.scores import ScoreRequest

        return work.parts.models.forward([ScoreRequest("policy", sequences, temperature, entropy)])[0]

    def sequences(self, work: Work) -> Sequences:
        """Of several lengths, two of one prompt."""
        from rlhf.sequences import Sequences

        codec = self.codec(work)
        prompts = [codec.prompt(text) for text in ("m n ", "p q r s t: ")]
        responses = [codec.response(text) for text in ("abc", "a", "d e f g h")]
        return Sequences.of(prompts, responses, prompt_of=[0, 0, 1])

    def codec(self, work: Work) -> Any:
        return work.parts.models.policy.codec(work.plan.role("policy").model.path)

    # The terms

    def test_text_comes_back(self, rlhf_kit: Kit) -> None:
        codec = self.codec(self.work(rlhf_kit))
        tokens = codec.response(_TEXT, "m n ")
        require(int(tokens[-1]) == codec.eos, "a response isn't closed by the codec's `eos`")
        require(codec.decode(tokens) == _TEXT, f"{_TEXT!r} comes back as {codec.decode(tokens)!r}")
        open_ = codec.response(_TEXT, "m n ", end=False)
        require(codec.eos not in open_.tolist(), "a response that doesn't end (end=False) is closed")
        require(len(codec.prompt("")) >= 1, "an empty prompt has no token, and the first response token needs one")

    def test_log_probs_are_a_distributions(self, rlhf_kit: Kit) -> None:
        """Over every token that may come next they add up to 1, at any temperature; and the entropy is theirs."""
        import torch

        work = self.work(rlhf_kit)
        plain = self._next(work, 1.0)
        heated = self._next(work, 2.0)
        for name, found in (("1", plain), ("2", heated)):
            total = float(found.exp().sum())
            told = f"at temperature {name}, probabilities of the next token add up to {total:.6g}"
            require(abs(total - 1.0) < 1e-3, told)
        wanted = torch.log_softmax(plain / 2.0, dim=-1)
        off = float((wanted - heated).abs().max())
        require(off < 1e-3, "temperature 2 doesn't halve the logits: log-probs are of what is sampled from")
        entropy = float(self._one(work, 0, 1.0, entropy=True).entropy.detach())
        own = float(-(plain.exp() * plain).sum())
        require(abs(entropy - own) < 1e-3, f"the entropy is {entropy:.6g}, and of its log-probs {own:.6g}")

    def test_a_sequence_scores_the_same_in_any_batch(self, rlhf_kit: Kit) -> None:
        """Padding and shared prompts change speed, not numbers."""
        import torch

        work = self.work(rlhf_kit)
        sequences = self.sequences(work)
        whole = self.score(work, sequences).logp.detach()
        require(whole.shape == sequences.tokens.shape, f"log-probs of shape {tuple(whole.shape)}, not one a token")
        for row in range(len(sequences)):
            rows = torch.tensor([row])
            alone = self.score(work, sequences.select(rows)).logp.detach()
            off = float((alone - whole[sequences.token_index(rows)]).abs().max())
            require(off <= self.tolerance, f"sequence {row} alone scores otherwise than in a batch, by {off:.3g} nats")

    def test_gradients_reach_the_weights(self, rlhf_kit: Kit) -> None:
        work = self.work(rlhf_kit)
        self.score(work, self.sequences(work)).logp.sum().backward()
        lacking = [n for n, p in work.parts.models.trained.named_parameters() if p.requires_grad and p.grad is None]
        require(not lacking, f"no gradient reaches {', '.join(lacking[:3])}")
        for parameter in work.parts.models.trained.parameters():
            parameter.grad = None

    def test_a_scalar_head_can_be_added(self, rlhf_kit: Kit) -> None:
        """One number a token, the value of the state before it, and one a sequence."""
        from rlhf.interfaces import HeadRequest

        work = self.work(rlhf_kit)
        policy, body = work.parts.models.policy, work.parts.models.body("policy")
        head = policy.add_scalar_head(body, "value", "zero", 0)
        sequences = self.sequences(work)
        found = policy.score(body, sequences, [HeadRequest("policy", "lm"), HeadRequest("value", "scalar", head)])
        require([one.role for one in found] == ["policy", "value"], "its scores aren't in the order of the heads")
        values, score = found[1].values, found[1].score
        require(values.shape == sequences.tokens.shape, f"values of shape {tuple(values.shape)}, not one a token")
        require(score.shape == (len(sequences),), f"scores of shape {tuple(score.shape)}, not one a sequence")
        require(not bool(values.any()), "a head that starts at zero gives values other than 0")

    def test_what_is_saved_is_the_model(self, rlhf_kit: Kit) -> None:
        work = rlhf_kit.work(self.plan(rlhf_kit, max_steps=2))
        work.go()
        trained = self.score(work, self.sequences(work)).logp.detach()
        again = rlhf_kit.work(self.plan(rlhf_kit, model=str(work.folder / "model")))
        off = float((self.score(again, self.sequences(again)).logp.detach() - trained).abs().max())
        require(off <= self.tolerance, f"loaded again, the saved model's log-probs are off by {off:.3g} nats")

    def _one(self, work: Work, token: int, temperature: float, entropy: bool = False) -> Scores:
        import torch

        from rlhf.sequences import Sequences

        prompt = self.codec(work).prompt("m n ")
        return self.score(work, Sequences.of([prompt], [torch.tensor([token])]), temperature, entropy)

    def _next(self, work: Work, temperature: float) -> Tensor:
        """Log-probs of every token after a prompt, each asked for by itself, [V]."""
        import torch

        from rlhf.sequences import Sequences

        size = int(work.plan.role("policy").model.get("vocab_size"))
        every = [torch.tensor([token]) for token in range(size)]
        sequences = Sequences.of([self.codec(work).prompt("m n ")], every, prompt_of=[0] * size)
        return self.score(work, sequences, temperature).logp.detach()
