"""Eqs. 5-7: who sees whom, proved by gradients and by dense passes over one image at a time; the
loss by a slow loop."""
import copy

import pytest
import torch
import torch.nn.functional as F

import dseq_jepa
from attention import arrange, sizes
from build import build_model, build_views
from dseq_jepa import (
    Plan,
    encoder_places,
    flat,
    predictor_places,
    sequential,
    vicreg_terms,
)
from images import Batch

B, SIDE, PATCH, N = 3, 48, 8, 4             # 6 x 6 patches
P = (SIDE // PATCH) ** 2


def model(make_config, **changes):
    values = (
        dict(
            image_size=SIDE,
            patch_size=PATCH,
            encoder="vit-nano",
            min_patches=2,
            region_count=N,
            predictor_width=32,
            predictor_depth=2,
        )
        | changes
    )
    net = build_model(make_config("folder", "regions", **values), {})
    # trained-looking weights: nothing is zero, nothing dominates
    for p in net.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return net


def batch(ranks=None, progress=0.0, coin=0.5):
    ranks = torch.randint(1, N + 1, (B, P)) if ranks is None else ranks
    return Batch(
        torch.randn(len(ranks), 1, 3, SIDE, SIDE),
        ranks[:, None],
        torch.full((len(ranks), 1), coin),
        None,
        torch.tensor(progress),
    )


def patches_that_matter(images, output):
    """(B, P) bool: which patches' pixels have a gradient from `output`."""
    gradient, = torch.autograd.grad(output.square().sum(), images, retain_graph=True)
    return F.max_pool2d(gradient.abs().sum(1), PATCH).flatten(1) > 0


# ---------------------------------------------------------------- plans

def test_sequential_by_hand():
    ranks = torch.tensor(
        [[1, 2, 3, 4, 1], [1, 4, 4, 1, 1], [4, 4, 4, 4, 4], [2, 4, 3, 3, 2], [1, 0, 2, 3, 0]]
    )
    plan = sequential(ranks, 4)
    assert plan.context.tolist() == [
        [1, 2, 3, 0, 1],
        [1, 0, 0, 1, 1],
        [0, 0, 0, 0, 0],
        [2, 0, 3, 3, 2],
        [1, 0, 2, 0, 0],
    ]
    assert plan.target[:, 0].tolist() == [
        [0, 1, 2, 3, 0],
        [0, 3, 3, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 3, 2, 2, 0],
        [0, 0, 1, 2, 0],
    ]


def test_flat_by_hand():
    plan = flat(torch.tensor([[1, 2, 3, 4, 4], [1, 2, 3, 1, 2]]), 4)
    assert plan.context.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    # without a rest there is nothing to predict from
    assert plan.target[:, 0].tolist() == [[1, 2, 3, 0, 0], [0, 0, 0, 0, 0]]


# ---------------------------------------------------------------- the places, as dseq_jepa.py draws
# them

EXAMPLE = torch.tensor([[1, 1, 2, 3, 3, 3]])


def test_the_plans_that_are_drawn():
    one, other = sequential(EXAMPLE, 3), flat(EXAMPLE, 3)
    assert one.context.tolist() == [[1, 1, 2, 0, 0, 0]]
    assert one.target.tolist() == [[[0, 0, 1, 2, 2, 2]]]
    assert other.context.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert other.target.tolist() == [[[1, 1, 2, 0, 0, 0]]]


def test_the_places_that_are_drawn_and_who_sees_whom():
    plan = sequential(EXAMPLE, 3)
    seen = encoder_places(plan.context, 2)
    assert seen.tolist() == [[1, 2, 1, 1, 2, 0, 0, 0]]
    rank, group = predictor_places(plan.context, 2, plan.target, region_causal=True)
    assert rank.tolist() == [[0, 0, 1, 1, 2, 0, 0, 0, 0, 0, 1, 2, 2, 2]]
    assert group.tolist() == [[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2]]
    layout = arrange(rank, group, sizes(rank > 0)[0])
    sees = {
        int(p): layout.order[row[:7]].tolist() for p, row in zip(layout.order, layout.mask[0, 0])
    }
    assert sees == {
        2: [2, 3],
        3: [2, 3],
        4: [2, 3, 4],
        10: [2, 3, 10],
    } | {p: [2, 3, 4, 11, 12, 13] for p in (11, 12, 13)}


def test_places_of_several_predictions_without_groups():
    context, target = (
        torch.tensor([[1, 0, 0], [0, 0, 1]]),
        torch.tensor([[[0, 1, 0], [0, 0, 1]]] * 2),
    )
    seen = encoder_places(context, 1)
    # no copy for step 1
    assert encoder_places(context * 2, 2).tolist() == [[0, 2, 2, 0, 0], [0, 2, 0, 0, 2]]
    assert seen.tolist() == [[1, 1, 0, 0], [1, 0, 0, 1]]
    rank, group = predictor_places(context, 1, target, region_causal=False)
    assert rank.tolist() == [[0, 1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 1],
                             [0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0, 1]]
    assert not group.any()


# ---------------------------------------------------------------- who sees whom

@pytest.mark.parametrize("cls", [True, False])
def test_a_prediction_depends_on_all_earlier_regions_and_on_nothing_else(make_config, cls):
    net, ranks = model(make_config, cls=cls, regions="random"), torch.randint(1, N + 1, (B, P))
    images = torch.randn(B, 3, SIDE, SIDE, requires_grad=True)
    plan = sequential(ranks, N)
    z_hat, index = net.predict(images, plan)
    image, patch = index // P, index % P
    assert len(index) == (ranks > 1).sum()
    for b in range(B):
        for k in range(1, N):
            of_step = (image == b) & (ranks[b, patch] == k + 1)
            matters = patches_that_matter(images, z_hat[of_step])
            assert (
                torch.equal(matters[b], ranks[b] <= k) and not matters[torch.arange(B) != b].any()
            )


def test_cls_reaches_predictions_only_through_the_encoder_s_patches(make_config):
    """Whatever stands at [CLS] when the context encoder is done, no prediction changes."""
    net, plan = model(make_config, regions="random"), sequential(torch.randint(1, N + 1, (B, P)), N)
    images = torch.randn(B, 3, SIDE, SIDE)
    z_hat, _ = net.predict(images, plan)
    net.encoder.register_forward_hook(lambda part, args, outputs: [disturbed(args[1], outputs[-1])])

    def disturbed(layout, tokens):
        is_cls = layout.order % (net.copies + P) < net.copies
        assert is_cls.sum() == B * (N - 1)
        return torch.where(is_cls[:, None], 7.0, tokens)

    assert torch.equal(net.predict(images, plan)[0], z_hat)


@pytest.mark.parametrize("cls", [True, False])
def test_one_pass_is_separate_passes(make_config, cls):
    net, ranks, images = (
        model(make_config, cls=cls, regions="random"),
        torch.randint(1, N + 1, (B, P)),
        torch.randn(B, 3, SIDE, SIDE),
    )
    plan = sequential(ranks, N)
    together, index = net.predict(images, plan)
    for k in range(1, N):
        alone = Plan(
            torch.where(plan.context <= k, plan.context, 0), torch.where(plan.target == k, k, 0)
        )
        z_hat, some = net.predict(images, alone)
        torch.testing.assert_close(z_hat, together[torch.isin(index, some)], atol=1e-5, rtol=1e-5)


def dense(net, image, context, target, masks_are_seen):
    """Predictions of the patches `target` from the patches `context`: one image, no packing, no
    ranks."""
    x = net.encoder.tokens(image[None], net.copies)[0]
    C = net.copies
    x = torch.cat([x[:C], x[C:][context]])[None]
    for block in net.encoder.blocks:
        x = block(x)
    h, p = net.predictor, net.predictor.positions
    x = h.embed(net.encoder.norm(x)[0, C:]) + p[context]            # [CLS] stays behind (Eq. 5)
    n, x = len(x), torch.cat([x, h.mask_token + p[target]])[None]
    see = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    see[:n, n:] = masks_are_seen
    for block in h.blocks:
        q, k, v = (
            block.attn.qkv(block.norm1(x))
            .unflatten(2, (3, block.attn.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        weight = (
            (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~see, float("-inf")).softmax(3)
        )
        x = x + block.attn.proj((weight @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return h.project(h.norm(x[0, n:]))


@pytest.mark.parametrize("cls", [True, False])
def test_i_jepa_is_a_dense_pass_per_image_and_block(make_config, cls):
    net = model(make_config, method="i-jepa", cls=cls)
    target = torch.rand(B, 4, P) < 0.2
    context = (torch.rand(B, P) < 0.5) & ~target.any(1)
    images = torch.randn(B, 3, SIDE, SIDE)
    z_hat, index = net.predict(images, Plan(context.long(), target.long()))
    expected = torch.cat(
        [dense(net, images[b], context[b], target[b, v], True) for b in range(B) for v in range(4)]
    )
    torch.testing.assert_close(z_hat, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(index, target.flatten().nonzero().flatten())


@pytest.mark.parametrize("make_plan", [sequential, flat])
def test_two_regions_are_a_dense_pass(make_config, make_plan):
    net, images = (
        model(
            make_config,
            order="flat" if make_plan is flat else "discriminative",
            region_count=2,
            regions="random",
        ),
        torch.randn(B, 3, SIDE, SIDE),
    )
    ranks = torch.randint(1, 3, (B, P))
    seen, predicted = (2, 1) if make_plan is flat else (1, 2)
    z_hat, _ = net.predict(images, make_plan(ranks, 2))
    expected = torch.cat(
        [dense(net, images[b], ranks[b] == seen, ranks[b] == predicted, False) for b in range(B)]
    )
    torch.testing.assert_close(z_hat, expected, atol=1e-4, rtol=1e-4)


def test_other_images_and_their_order_change_nothing(make_config):
    net, b = model(make_config, regions="random"), batch()
    h = torch.randn(B, P, net.encoder.dim)

    def losses(rows):
        plan = sequential(b.actions[rows, 0], N)
        return net.step_losses(*net.predict(b.views[rows, 0], plan), plan, h[rows])[0]

    together = losses(torch.arange(B))
    torch.testing.assert_close(
        losses(torch.tensor([2, 0, 1])), together[[2, 0, 1]], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(losses(torch.tensor([1])), together[[1]], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- loss

def test_loss_is_eqs_6_and_7_by_a_slow_loop(make_config):
    net, ranks = model(make_config, regions="random"), torch.randint(1, N + 1, (B, P))
    ranks[1][ranks[1] == 2] = 1                                     # a region that is absent
    b = batch(ranks)
    h = net.look(b)[1]
    z_hat, index = net.predict(b.views[:, 0], sequential(ranks, N))
    prediction = {int(i): z for i, z in zip(index, z_hat)}
    per_image = []
    for image in range(B):
        steps = []
        for k in range(2, N + 1):
            region = [p for p in range(P) if ranks[image, p] == k]
            errors = [(prediction[image * P + p] - h[image, p]).abs() for p in region]
            if region:
                steps.append(
                    torch.stack(
                        [torch.where(e < 1, e * e / 2, e - 0.5).mean() for e in errors]
                    ).mean()
                )
        per_image.append(torch.stack(steps).mean())
    out = net(b)
    torch.testing.assert_close(out.loss, torch.stack(per_image).mean(), atol=1e-5, rtol=1e-5)
    assert out.logs["steps"] == pytest.approx((3 + 2 + 3) / 3)


def test_targets_are_layer_normalised_and_whole_image(make_config):
    net, b = model(make_config), batch()
    tokens, h, saliency = net.look(b)
    whole = net.target_encoder(b.views[:, 0])[-1][:, 1:]
    torch.testing.assert_close(tokens, whole)
    torch.testing.assert_close(
        h,
        (whole - whole.mean(2, keepdim=True))
        / (whole.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    )
    assert saliency.shape == (B, P) and saliency.amin() == 0 and saliency.amax() == 1


def test_saliency_is_the_similarity_to_cls_at_block_l(make_config):
    net, b = model(make_config, saliency_block=2), batch()
    x = net.target_encoder.tokens(b.views[:, 0])
    for block in net.target_encoder.blocks[:2]:
        x = block(x)
    for b_, s in zip(x, net.look(b)[2]):
        cosine = torch.stack([b_[0] @ t / (b_[0].norm() * t.norm()) for t in b_[1:]])
        torch.testing.assert_close(
            s, (cosine - cosine.min()) / (cosine.max() - cosine.min()), atol=1e-5, rtol=1e-4
        )


def test_an_image_with_one_region_teaches_the_encoder(make_config):
    """In the authors' code the prediction ignores the image and the encoder gets no
    gradient."""
    ranks = torch.full((1, P), N)
    ranks[0, :5] = 1
    net = model(make_config, regions="random")
    out = net(batch(ranks))
    out.loss.backward()
    assert out.logs["steps"] == 1 and all(
        p.grad.norm() > 0 for n, p in net.encoder.named_parameters() if n.startswith("blocks.0.mlp")
    )


def test_images_without_a_step_add_nothing_and_break_nothing(make_config):
    net, ranks = model(make_config, regions="random"), torch.full((B, P), N)
    out = net(batch(ranks))
    out.loss.backward()
    assert (
        out.loss == 0
        and out.logs["steps"] == 0
        and all(p.grad is None or not p.grad.any() for p in net.parameters())
    )
    ranks[0, :9] = 1
    b = batch(ranks)
    alone = net(b._replace(views=b.views[:1], actions=b.actions[:1], params=b.params[:1])).loss
    torch.testing.assert_close(net(b).loss, alone)              # the two others count for nothing


def test_target_gets_no_gradient_and_moves_by_one_minus_tau(make_config):
    net = model(make_config)
    net(batch()).loss.backward()
    assert all(p.grad is None for p in net.target_encoder.parameters())
    missing = [
        n
        for n, p in net.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    # [CLS] and the mask token learn too
    assert missing == []
    before = copy.deepcopy(net.target_encoder)
    net.update_target(0.75)
    for new, old, online in zip(
        net.target_encoder.parameters(), before.parameters(), net.encoder.parameters()
    ):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)


# ---------------------------------------------------------------- curriculum, proxies, relatives

@pytest.mark.parametrize(
    "progress, coin, salient",
    [(0.0, 0.0, False), (0.4, 0.3, True), (0.4, 0.5, False), (1.0, 0.999, True)],
)
def test_curriculum_is_a_coin_per_sample(make_config, monkeypatch, progress, coin, salient):
    net, b = model(make_config), batch(progress=progress, coin=coin)
    found = torch.full((B, *net.encoder.grid), N)
    found[:, 0] = 1
    monkeypatch.setattr(dseq_jepa, "discriminative_regions", lambda *args: found)
    plan = net.plan(b, torch.rand(B, P), net.encoder.grid)
    expected = sequential(found.flatten(1) if salient else b.actions[:, 0], N)
    assert torch.equal(plan.context, expected.context) and torch.equal(plan.target, expected.target)


def test_polarity_border_turns_saliency_upside_down_where_the_border_is_salient(make_config):
    plain, turned = model(make_config), model(make_config, polarity="border")
    turned.load_state_dict(plain.state_dict())
    b = batch()
    s, t = plain.look(b)[2].view(B, 6, 6), turned.look(b)[2].view(B, 6, 6)
    inside = s[:, 1:-1, 1:-1]
    for image in range(B):
        ring = (s[image].sum() - inside[image].sum()) / 20
        expected = 1 - s[image] if ring > inside[image].mean() else s[image]
        torch.testing.assert_close(t[image], expected)


def test_logs_say_where_saliency_is(make_config):
    net, b = model(make_config), batch()
    s = net.look(b)[2].view(B, 6, 6)
    logs = net(b).logs
    centre = s[:, 2:4, 2:4].sum((1, 2)) / s.sum((1, 2))
    ring = 1 - s[:, 1:-1, 1:-1].sum((1, 2)) / s.sum((1, 2))
    torch.testing.assert_close(logs["saliency_centre"], centre.mean())
    torch.testing.assert_close(logs["saliency_ring"], ring.mean())
    assert "saliency_ring" not in model(make_config, regions="random")(b).logs


def test_grad_cam_proxy_by_hand(make_config):
    net, b = model(make_config, proxy="grad-cam", cls=False), batch()
    _, h, saliency = net.look(b)
    plan = sequential(b.actions[:, 0], N)
    z_hat, index = (x.detach() for x in net.predict(b.views[:, 0], plan))
    tokens = h.clone().requires_grad_()
    loss = 0
    for image in range(B):
        for k in range(2, N + 1):
            rows = (index // P == image) & (b.actions[image, 0][index % P] == k)
            loss = loss + F.smooth_l1_loss(z_hat[rows], tokens[image, index[rows] % P])
    loss.backward()
    alpha = tokens.grad.mean(1, keepdim=True)                       # Eq. 8's channel weights
    cam = (alpha * h).sum(2).relu()
    low, high = cam.amin(1, keepdim=True), cam.amax(1, keepdim=True)
    torch.testing.assert_close(saliency, (cam - low) / (high - low), atol=1e-4, rtol=1e-3)
    net(b).loss.backward()
    assert net.encoder.patch_embed.proj.weight.grad.norm() > 0


def test_vicreg_terms_by_the_formula():
    x, y = torch.randn(12, 5) * 0.5, torch.randn(12, 5)
    covariance = torch.cov(x.T)
    expected = (
        25 * ((x - y) ** 2).mean()
        + 25 * torch.relu(1 - (covariance.diag() + 1e-4).sqrt()).mean()
        + (covariance - covariance.diag().diag()).square().sum() / 5
    )
    torch.testing.assert_close(vicreg_terms(x, y, torch.ones(12)), expected)
    # images without a prediction change nothing
    more = [torch.cat([v, torch.full((3, 5), 7.0)]) for v in (x, y)]
    torch.testing.assert_close(
        vicreg_terms(*more, torch.cat([torch.ones(12), torch.zeros(3)])), expected
    )
    assert all(
        vicreg_terms(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor(counts)).isfinite()
        for counts in ([1.0, 0.0], [0.0, 0.0])
    )


def test_means_of_many_tokens_are_exact_under_bf16(make_config):
    """bf16 counts to 256 and no further."""
    net = model(make_config, method="c-jepa", region_count=2)
    index, P = torch.arange(600), 600
    plan = Plan(torch.zeros(1, P, dtype=torch.long), torch.ones(1, 1, P, dtype=torch.long))
    x, _, counts = net.image_means(
        torch.ones(600, 8, dtype=torch.bfloat16), index, plan, torch.zeros(1, P, 8)
    )
    assert torch.equal(x, torch.ones(1, 8)) and counts.tolist() == [1]


@pytest.mark.parametrize("method", ["c-jepa", "dseq-c-jepa"])
def test_vicreg_acts_on_image_means(make_config, method):
    net = model(make_config, method=method, regions="random")
    plain = copy.deepcopy(net)
    plain.vicreg = 0
    target = torch.rand(B, 4, P) < 0.2
    blocks = (
        torch.cat([~target.any(1, keepdim=True), target], 1).long()
        if method == "c-jepa"
        else torch.randint(1, N + 1, (B, 1, P))
    )
    b = batch()._replace(actions=blocks)
    _, h, saliency = net.look(b)
    plan = net.plan(b, saliency, net.encoder.grid)
    z_hat, index = net.predict(b.views[:, 0], plan)
    image, patch = index // (P * plan.target.shape[1]), index % P
    x = torch.stack([z_hat[image == i].mean(0) for i in range(B)])
    y = torch.stack([h[i, patch[image == i]].mean(0) for i in range(B)])
    torch.testing.assert_close(
        net(b).loss - plain(b).loss, 0.001 * vicreg_terms(x, y, torch.ones(B)), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(method="dseq-jepa"),
        dict(method="i-jepa"),
        dict(method="c-jepa"),
        dict(method="dseq-c-jepa"),
        dict(method="i-jepa", cls=False),
        dict(regions="otsu"),
        dict(regions="random"),
        dict(order="random"),
        dict(order="spatial"),
        dict(order="inverse"),
        dict(max_region=1.0),
        dict(order="truncated"),
        dict(order="flat"),
        dict(regions="random", order="flat"),
        dict(proxy="grad-cam"),
        dict(proxy="grad-cam", cls=False),
        dict(region_count=2),
        dict(region_count=7),
    ],
    ids=str,
)
def test_every_method_and_ablation_takes_a_step(make_config, make_split, monkeypatch, changes):
    monkeypatch.setattr("build.load", lambda config, split: make_split(8, SIDE))
    values = dict(image_size=SIDE, patch_size=PATCH, encoder="vit-nano", min_patches=2) | changes
    config = make_config("folder", "regions", **values)
    views, net = build_views(config, "pretrain", torch.device("cpu")), build_model(config, {})
    out = net(views(torch.arange(8), 1)._replace(progress=torch.tensor(0.5)))
    out.loss.backward()
    assert (
        out.loss.isfinite() and out.loss > 0 and net.encoder.patch_embed.proj.weight.grad.norm() > 0
    )
    assert (
        out.z.shape == (8, P, 128)
        and out.z_agg.shape == (8, 128)
        and 0 < out.logs["steps"] <= max(4, config.region_count - 1)
    )
