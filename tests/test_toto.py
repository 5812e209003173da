"""toto.py against independent references: explicit formulas, torch's own modules, Hugging Face's Llama."""

import shutil
from dataclasses import replace

import pytest
import torch

import toto

SMALL = toto.Config(dim=64, n_heads=4, n_layers=3, hidden=96, vocab_size=70)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = toto.Toto(SMALL)
    for p in model.parameters():  # larger than at the start of training, so that errors would show
        torch.nn.init.normal_(p, std=0.2) if p.dim() == 2 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.eval()


def random_ids(*shape):
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(1))


# Table 1's sizes as its table and the widths worked out for them give, in millions, for the tied 8,196 ids.
@pytest.mark.parametrize("size, millions", [("base", 119.56), ("large", 276.86), ("1b", 1147.24)])
def test_parameter_counts(size, millions):
    with torch.device("meta"):
        assert toto.Toto(toto.SIZES[size]).count_parameters() / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    "size, D, L",
    [("a1", 256, 12), ("a2", 512, 16), ("a3", 768, 20), ("a4", 1024, 24), ("a5", 1536, 28), ("a6", 1792, 32)],
)
def test_table_15_counts(size, D, L):
    """A layer has four D x D matrices, three D x 4D matrices and two norms; then the embedding and a norm."""
    with torch.device("meta"):
        model = toto.Toto(toto.SIZES[size])
    assert model.config.n_heads == 16
    assert model.count_parameters() == L * (4 * D * D + 12 * D * D + 2 * D) + 8196 * D + D


@pytest.mark.parametrize("mup_width", [0, 16])
def test_exports_to_hugging_face_llama(model, mup_width, tmp_path):
    """The whole model, logits and loss, against an implementation that we did not write, and that reads our export."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers to compare with its Llama")
    config = replace(SMALL, mup_width=mup_width)
    model = toto.from_checkpoint({"model": model.state_dict(), "config": config})
    toto.export_hf(model, tmp_path / "hf")
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    llama, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert isinstance(llama, transformers.LlamaForCausalLM) and not any(report.values()), report
    untied = SMALL.vocab_size * SMALL.dim if mup_width else 0
    assert llama.num_parameters() == model.count_parameters() + untied
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = llama(ids, labels=ids)
        torch.testing.assert_close(model(ids), expected.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:]), expected.loss, atol=1e-5, rtol=1e-5)


def test_rms_norm_matches_torch():
    norm = toto.RMSNorm(16)
    torch.nn.init.normal_(norm.weight)
    reference = torch.nn.RMSNorm(16, eps=1e-5)
    reference.load_state_dict(norm.state_dict())
    x = 100 * torch.randn(3, 5, 16)
    torch.testing.assert_close(norm(x), reference(x))
    torch.testing.assert_close(
        norm(x), x / (x.double() ** 2).mean(-1, keepdim=True).add(1e-5).sqrt().float() * norm.weight
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "dtype, T, tolerance", [(torch.float32, 37, 1e-5), (torch.bfloat16, 37, 2e-2), (torch.bfloat16, 600, 2e-2)]
)
def test_attention_matches_explicit_softmax(causal, dtype, T, tolerance):
    """Both ways through `attend`, values and gradients, against softmax(q kᵀ / √d + mask) v in float64."""
    q, k, v = torch.randn(3, 2, 3, T, 16).to(dtype)
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    scores = exact[0] @ exact[1].transpose(2, 3) / 4
    if causal:
        scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    expected, got = scores.softmax(-1) @ exact[2], toto.attend(*tensors, causal)
    outer = torch.randn_like(expected)
    expected.backward(outer)
    got.backward(outer.to(dtype))
    for a, b in [(got, expected)] + [(x.grad, y.grad) for x, y in zip(tensors, exact)]:
        assert (a - b).norm() / b.norm() < tolerance


def test_rope_depends_on_distance_only():
    """q at position m and k at position n have a product that depends on m - n alone; position 0 is left as it is."""
    q, k = torch.randn(2, 1, 1, 1, 32)
    cos, sin = toto.rope_table(torch.arange(200), 32, 10_000.0)  # (200, 32) each
    at = lambda x, p: toto.apply_rope(x, cos[p : p + 1], sin[p : p + 1])
    product = lambda m, n: (at(q, m) * at(k, n)).sum()
    for distance in (0, 1, 63):
        torch.testing.assert_close(product(distance, 0), product(100 + distance, 100), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(at(q, 0), q)
    assert not torch.allclose(product(1, 0), product(2, 0), atol=1e-3)
    # The angles themselves: position p turns pair i by p · 10000^(-2i/32).
    assert cos[7, 3].item() == pytest.approx(torch.cos(torch.tensor(7 * 10_000 ** (-6 / 32))).item(), abs=1e-6)


def test_swiglu():
    mlp = toto.MLP(SMALL)
    x = torch.randn(5, SMALL.dim)
    gate, up = mlp.gate_up.weight[: SMALL.hidden], mlp.gate_up.weight[SMALL.hidden :]
    expected = (torch.sigmoid(x @ gate.T) * (x @ gate.T) * (x @ up.T)) @ mlp.out.weight.T
    torch.testing.assert_close(mlp(x), expected)


def test_causality(model):
    """Changing one token changes nothing before it, and something at and after it; without the mask, also before."""
    ids = random_ids(1, 20)
    changed = ids.clone()
    changed[0, 11] = (changed[0, 11] + 1) % SMALL.vocab_size
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax(dim=-1)[0]
        full = [model.features(x, [3], causal=False)[3] for x in (ids, changed)]
    assert difference[:11].max() == 0 and difference[11:].min() > 0
    assert (full[0] - full[1])[0, :11].abs().max() > 1e-3


def test_loss_is_the_mean_negative_log_likelihood(model):
    ids = random_ids(2, 9)
    p = model(ids[:, :-1]).double().softmax(-1)
    expected = -p.gather(2, ids[:, 1:, None]).log().mean()
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(expected.item(), abs=1e-5)
    with torch.no_grad():  # the plain form of Eq. 2
        assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(expected.item(), abs=1e-5)


def test_padding_rows_change_nothing(model):
    """The embedding has 128 rows for 70 ids; what is in the others must not matter."""
    ids = random_ids(2, 9)
    before = model(ids[:, :-1], ids[:, 1:])
    before.backward()
    assert model.embedding.weight.grad[SMALL.vocab_size :].abs().max() == 0
    with torch.no_grad():
        model.embedding.weight[SMALL.vocab_size :] = 1e3
    assert model(ids).shape[-1] == SMALL.vocab_size
    assert model(ids[:, :-1], ids[:, 1:]).item() == before.item()


def test_features_are_the_residual_stream(model):
    ids = random_ids(2, 9)
    with torch.no_grad():
        features = model.features(ids, [0, 2, 3])
        x = model.embedding(ids)
        torch.testing.assert_close(features[0], x)
        torch.testing.assert_close(model.logits(features[3]), model(ids))
        assert list(features) == [0, 2, 3]
        # Eq. 3 and 4 by hand for one block, from H_2 to H_3.
        block, x = model.blocks[2], features[2]
        rope = toto.rope_table(torch.arange(9), 16, SMALL.rope_base)
        x = x + block.attention(block.attention_norm(x), rope)
        torch.testing.assert_close(x + block.mlp(block.mlp_norm(x)), features[3])
    with pytest.raises(ValueError, match="layer 4 does not exist"):
        model.features(ids, [4])


def test_embeddings_are_taken_in_place_of_ids(model):
    """What a patch embedding gives (Table 3): gradients reach it, and loss and features are those of the ids."""
    ids = torch.randint(0, model.config.vocab_size, (2, 20))
    x = model.embedding.weight[ids].detach().requires_grad_()
    assert torch.equal(model(x), model(ids))
    assert torch.equal(model.features(x, [2])[2], model.features(ids, [2])[2])
    model(x, ids).backward()
    assert x.grad.abs().sum() > 0


def test_features_stop_at_the_deepest_layer(model):
    model.blocks[2] = None  # would raise if it were called
    assert set(model.features(random_ids(1, 5), [1, 2])) == {1, 2}


@pytest.mark.parametrize("mup_width", [0, 16])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prompt", [1, 8])
def test_cached_logits_equal_uncached(model, batch_size, prompt, mup_width):
    model = toto.from_checkpoint({"model": model.state_dict(), "config": replace(SMALL, mup_width=mup_width)})
    ids = random_ids(batch_size, 21)
    cache = toto.Cache(model, batch_size, 21)
    with torch.no_grad():
        cached = [cache(new) for new in [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]]
        torch.testing.assert_close(torch.stack(cached, dim=1), model(ids)[:, prompt - 1 :], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("dtype, mup_width", [(torch.float32, 0), (torch.float32, 16), (torch.bfloat16, 0)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_compiled_step(model, batch_size, dtype, mup_width):
    """It reads the whole cache behind a mask: also what an earlier, longer sequence has left there must not count."""
    check_compiled_step(model, batch_size, dtype, mup_width, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph: needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_step(model, dtype):
    check_compiled_step(model, 3, dtype, 0, "cuda")


def check_compiled_step(model, batch_size, dtype, mup_width, device):
    checkpoint = {"model": model.state_dict(), "config": replace(SMALL, mup_width=mup_width)}
    model, tested = (toto.from_checkpoint(checkpoint, device, each) for each in (torch.float32, dtype))
    tested = toto.for_sampling(tested, batch_size, compile=True)
    torch.compiler.reset()  # torch keeps at most eight compilations of one function
    cache = toto.Cache(tested, batch_size, 21, compile=True)
    for n_ids, prompt in ((20, 8), (12, 1)):
        ids, cache.length = random_ids(batch_size, n_ids).to(device), 0
        with torch.inference_mode():
            cached = [cache(new) for new in [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]]
            got, expected = torch.stack(cached, dim=1), model(ids)[:, prompt - 1 :]
        assert (got - expected).norm() / expected.norm() < (1e-5 if tested.compute_dtype == torch.float32 else 0.05)
    ids = random_ids(batch_size, 5).to(device)
    out = tested.generate(ids, 12, temperature=0, cache=cache)
    assert torch.equal(out, tested.generate(ids, 12, temperature=0, cache=cache)) and torch.equal(out[:, :5], ids)


def test_a_cache_of_another_size_is_refused(model):
    cache = toto.Cache(model, 2, 10)
    assert model.generate(random_ids(2, 4), 6, cache=cache).shape == (2, 10)
    for batch_size, n_ids in ((2, 5), (3, 4)):
        with pytest.raises(ValueError, match="2 sequences of up to 10 ids, not"):
            model.generate(random_ids(batch_size, n_ids), 6, cache=cache)


def test_greedy_generation_is_the_argmax_of_the_uncached_model(model):
    ids = random_ids(2, 6)
    out = model.generate(ids, 12, temperature=0)
    assert torch.equal(out[:, :6], ids) and out.min() >= 0
    with torch.no_grad():
        for i in range(6, 18):
            codes = model(out[:, :i])[:, -1, toto.FIRST_CODE :]
            assert torch.equal(out[:, i], toto.FIRST_CODE + codes.argmax(-1))


def test_generation_never_draws_special_ids(model):
    with torch.no_grad():  # make start, end and padding ids far more probable than any code
        model.embedding.weight[: toto.FIRST_CODE] = 50 * model.embedding.weight[: toto.FIRST_CODE]
    out = model.generate(random_ids(8, 3), 50, temperature=2.0, generator=torch.Generator().manual_seed(0))
    assert out[:, 3:].min() >= toto.FIRST_CODE and out.max() < SMALL.vocab_size


def test_sampling_filters():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    draw = lambda **how: (
        torch.bincount(toto.sample_from(logits, generator=torch.Generator().manual_seed(0), **how), minlength=4)
        / len(logits)
    )
    torch.testing.assert_close(draw(), logits[0].exp(), atol=0.03, rtol=0)
    torch.testing.assert_close(draw(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    # The fewest codes with 0.7 together: the first two (0.5 alone is too little).
    torch.testing.assert_close(draw(top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    assert draw(top_p=0.5)[0] == 1 and draw(temperature=0)[0] == 1
    cold = (logits[0] / 0.5).softmax(-1)
    torch.testing.assert_close(draw(temperature=0.5), cold, atol=0.03, rtol=0)


def test_bfloat16_is_close_to_float32(model):
    ids = random_ids(2, 300)  # long enough for the blocked attention
    fast = toto.Toto(SMALL, torch.bfloat16)
    fast.load_state_dict(model.state_dict())
    with torch.no_grad():
        a, b = model(ids), fast(ids)
    assert b.dtype == torch.float32 and (a - b).norm() / a.norm() < 0.05


def test_load_refuses_what_is_no_checkpoint(tmp_path):
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint")
    torch.save({"something": 1}, tmp_path / "other.pt")
    for name in ("noise.pt", "other.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a checkpoint written by train.py"):
            toto.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        toto.load(tmp_path / "missing.pt")


@pytest.mark.parametrize("vocab_size", [36, 8196])
def test_loss_in_chunks_equals_torch(vocab_size):
    """Eq. 2 without all logits at once: value and gradients of torch's cross-entropy on all of them, in float32."""
    torch.manual_seed(0)
    padded = -(-vocab_size // 128) * 128
    x = torch.randn(1100, 16, requires_grad=True)  # three chunks of 504 rows at the paper's vocabulary
    weight = torch.randn(padded, 16, requires_grad=True)
    targets = torch.randint(vocab_size, (1100,))
    loss = toto.ChunkedCrossEntropy.apply(x, weight, targets, vocab_size)
    (3 * loss).backward()
    got, x.grad, weight.grad = (x.grad, weight.grad), None, None
    expected = torch.nn.functional.cross_entropy((x @ weight.t())[:, :vocab_size], targets)
    (3 * expected).backward()
    assert torch.allclose(loss, expected, atol=1e-6)
    assert torch.allclose(got[0], x.grad, atol=1e-7) and torch.allclose(got[1], weight.grad, atol=1e-7)
    assert (got[1][vocab_size:] == 0).all()


def test_recomputing_changes_nothing(model):
    ids = random_ids(2, 20)
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
