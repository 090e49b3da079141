"""k-means against scikit-learn; the loss per step against the model's own; that figures are drawn
is tested with evaluate.py."""
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

import train
from build import build_model, build_views
from figures import regions as figures_regions
from figures.regions import k_means, step_losses


def test_k_means_finds_what_scikit_learn_finds():
    centres = torch.randn(5, 8) * 6
    x = centres[torch.arange(300) % 5] + torch.randn(300, 8)
    ours, theirs = k_means(x, 5), KMeans(5, n_init=5, random_state=0).fit_predict(x.numpy())
    assert adjusted_rand_score(ours.numpy(), theirs) == 1


def test_k_means_with_fewer_points_than_clusters():
    assert k_means(torch.ones(3, 2), 5).shape == (3,)


def test_step_losses_are_averages_over_the_images_that_have_the_step(
    make_config, make_split, monkeypatch
):
    monkeypatch.setattr("build.load", lambda config, split: make_split(9, 48))
    config = make_config(
        "folder", "regions", image_size=48, patch_size=8, encoder="vit-nano", min_patches=3
    )
    model, views = build_model(config, {}).eval(), build_views(config, "val", torch.device("cpu"))
    losses, images = step_losses(model, views, config)
    with torch.no_grad():
        batch = views(torch.arange(9))
        batch = batch._replace(
            views=views.clean(torch.arange(9))[:, None], progress=torch.tensor(1.0)
        )
        _, h, saliency = model.look(batch)
        plan = model.plan(batch, saliency, model.encoder.grid)
        per_step, predicted = model.step_losses(*model.predict(batch.views[:, 0], plan), plan, h)
    assert images.tolist() == predicted.sum(0).tolist() and images[-1] > 0
    for k in range(4):
        rows = predicted[:, k]
        if rows.any():
            torch.testing.assert_close(
                losses[k].float(), per_step[rows, k].mean(), atol=1e-5, rtol=1e-5
            )


def test_clusters_over_checkpoints_and_its_errors(photos, tmp_path, capsys):
    flags = (
        "--dataset folder --mode regions --encoder vit-nano --image-size 32 "
        "--patch-size 8 --min-patches 2 --epochs 2 --warmup-epochs 1 "
        f"--batch-size 12 --device cpu --keep-every 1 --data-dir {photos} --out {tmp_path} --name r"
    ).split()
    assert train.main(flags) == 0
    kept = [str(tmp_path / "r" / f"epoch-{e}.pt") for e in (1, 2)]
    assert figures_regions.main([*kept, "--out", str(tmp_path)]) == 0
    assert (
        figures_regions.main([kept[1], "--data-dir", str(photos), "--out", str(tmp_path / "r")])
        == 0
    )
    assert all(
        (folder / name).exists()
        for folder in (tmp_path, tmp_path / "r")
        for name in ("clusters.png", "regions.png")
    )
    assert figures_regions.main([kept[0], "--out", str(tmp_path / "nowhere")]) == 2
    capsys.readouterr()
    assert figures_regions.main([str(tmp_path / "absent.pt")]) == 2
    assert "absent.pt: no checkpoint there" in capsys.readouterr().err
