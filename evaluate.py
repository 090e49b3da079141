"""Evaluate a trained world model with the paper's protocols (seq-JEPA Secs. 4.3, 5.5, A.2, B.2).

    python evaluate.py runs/NAME/last.pt                       every probe that applies, one table
    python evaluate.py runs/NAME/last.pt --views 1 3 5         other inference lengths M_val
    python evaluate.py runs/NAME/last.pt --probe action path --figures
    python evaluate.py runs/NAME/last.pt --probe transfer --dataset imagenet --data-dir DIR       (B.6)
    python evaluate.py runs/NAME/last.pt --probe linear finetune --dataset folder --data-dir CUB   a ViT on other data

The probes of mode `regions` are in probes_regions.py.

Prints a table, each number beside the same probe on a randomly initialised model of the same shape, and
beside the paper's where there is one; writes it to runs/NAME/probes.json. Heads train on features that
were extracted once from the frozen model (probes.py). Checked in tests/test_evaluate.py.
"""
import argparse
import copy
import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import config as settings
import figures
import figures_regions
import probes_regions
from build import build_model, build_views
from paper import paper_numbers
from plumbing.device import pick_device, seed_all
from plumbing.errors import BadInput
from plumbing.files import save_atomically
from plumbing.report import write_report
from plumbing.runs import config_of, load_checkpoint, restore
from probes import accuracy, extract, fit, knn_accuracy, linear_head, mlp_head, r2, retrieval_ranks

HEADS = {"linear classifier": (linear_head, 300), "mlp": (mlp_head, 300), "linear": (linear_head, 50)}    # and epochs, A.2
# Which head regresses which part of an action.  A.2
REGRESSORS = {"position": "linear", "rotation": "mlp", "color": "linear", "crop": "mlp", "jitter": "mlp", "blur": "linear"}
LENGTHS = {"saccade": (1, 4, 6), "rotation": (1, 3, 5), "augment": (1, 3, 5)}             # M_val of Tables 1-3 and 6
QUICK_SHARE = 5                 # a --quick run trains MLP heads for a fifth of the protocol's epochs
SETTLE_BATCHES = 20


# ---------------------------------------------------------------- probes: (train features, val features, setup) -> rows

def probe_classify(train, val, setup):
    """Top-1 of a linear classifier on z and on z_agg for every M_val (Tables 1-3, 6)."""
    for (name, x), (_, x_val) in zip(train.named(), val.named()):
        head, epochs = fit_head("linear classifier", x, train.labels, len(setup.views["val"].classes), F.cross_entropy, setup)
        yield row("classify", "class", name, "linear classifier", epochs, "top-1 %", accuracy(head, x_val, val.labels))


def probe_knn(train, val, setup):
    """Top-1 of 20 nearest neighbours on the same features: nothing is trained."""
    for (name, x), (_, x_val) in zip(train.named(), val.named()):
        value = knn_accuracy(x[0], train.labels, x_val[0], val.labels)
        yield row("knn", "class", name, "k-NN, k 20, T 0.07", 0, "top-1 %", value)


def probe_action(train, val, setup):
    """R^2 of the relative action from the z of its two views (Sec. 4.3)."""
    for name, columns in setup.views["val"].groups.items():
        x, y = zip(*((f.z[:, :, :2].flatten(2), f.actions[:, :, 0, columns]) for f in (train, val)))
        yield regression("action", name, "z_1, z_2", x, y, setup)


def probe_parameters(train, val, setup):
    """R^2 of a view's own transformation parameters from its z alone (Table 1, last column)."""
    for name, columns in setup.views["val"].param_groups.items():
        x, y = zip(*((f.z[:, :, 0], f.params[:, :, 0, columns]) for f in (train, val)))
        yield regression("parameters", name, "z_1", x, y, setup)


def probe_path(train, val, setup):
    """Path integration (Sec. 5.5): R^2 of the action x_1 -> x_{M+1} from (z_agg, a_M); then without actions, without views."""
    name, views = next(iter(setup.views["val"].groups.items()))[0], setup.views["val"]
    columns = views.groups[name]
    for M in train.z_agg:
        y = [views.relative(f.params[:, :, 0], f.params[:, :, M])[..., columns] for f in (train, val)]
        for words, aggregates, keep_a in (("", "z_agg", 1), (", no actions", "z_agg_still", 0), (", no views", "z_agg_blind", 1)):
            x = [torch.cat([getattr(f, aggregates)[M], keep_a * f.a[:, :, M - 1]], dim=2) for f in (train, val)]
            yield regression("path", name, f"z_agg, a_M, M={M}{words}", x, y, setup)


def probe_invariance(train, val, setup):
    """R^2 of each view's own rotation from z_agg with the action embeddings zeroed, averaged over the views (B.2)."""
    M, columns = setup.M_train, setup.views["val"].param_groups["rotation"]
    x = [f.z_agg_still[M] for f in (train, val)]
    rows = [regression("invariance", "rotation", f"z_agg M={M}, no actions", x, [f.params[:, :, i, columns] for f in (train, val)], setup)
            for i in range(M)]
    yield rows[0] | dict(value=sum(r["value"] for r in rows) / M, per_view=[r["value"] for r in rows])


@torch.inference_mode()
def probe_retrieval(train, val, setup):
    """Does z_hat find the true next view among the object's views it has not seen? MRR, H@1, H@5 (as SIE's predictor metrics)."""
    views, M, model, ranks = setup.views["val"], setup.M_train, setup.model.eval(), []
    for index in torch.arange(len(views)).split(16):          # all renders of each
        seed_all(setup.seed, 2, int(index[0]))
        chosen = torch.rand(len(index), views.view_count).topk(M + 1).indices
        all_views, params = views.all_views(index)
        seen, row_of = params.gather(1, chosen.to(params.device)[..., None].expand(-1, -1, params.shape[2])), chosen.to(params.device)
        a = model.embed(views.relative(seen[:, :-1], seen[:, 1:]))
        z = model.encode(all_views.gather(1, row_of[:, :M, None, None, None].expand(-1, -1, *all_views.shape[2:])))
        z_hat = model.predict(model.aggregate(z, a[:, :-1]), a[:, -1])
        candidates = model.target_encoder(all_views.flatten(0, 1)).unflatten(0, all_views.shape[:2])
        allowed = torch.ones(all_views.shape[:2], dtype=torch.bool, device=z.device).scatter(1, row_of[:, :M], False)
        ranks.append(retrieval_ranks(z_hat, candidates, row_of[:, M], allowed).cpu())
    ranks = torch.cat(ranks).float()
    for name, value in (("MRR", 1 / ranks), ("H@1", (ranks <= 1).float()), ("H@5", (ranks <= 5).float())):
        yield row("retrieval", "next view", f"z_hat, M={M}, among {views.view_count - M}", "none", 0, name, value.mean().item())


def probe_transfer(train, val, setup):
    """Top-1 on another data set's classes from z_agg, with the multiply-adds an image costs (B.6)."""
    for M in train.z_agg:
        head, epochs = fit_head("linear classifier", train.z_agg[M], train.labels, len(setup.views["val"].classes), F.cross_entropy, setup)
        cost = multiply_adds(setup.model, setup.views["val"], M) / 1e9
        yield row("transfer", "class", f"z_agg M={M}, {cost:.3g}e9 MAC an image", "linear classifier", epochs, "top-1 %",
                  accuracy(head, val.z_agg[M], val.labels)) | dict(gmac=cost, patch_size=setup.views["val"].patch_size)


def multiply_adds(model, views, M):
    """Multiply-adds to encode and aggregate M views of one image: the "flops" of B.6 (a FLOP counter's number, halved)."""
    batch = views(torch.arange(2), M)
    model = copy.deepcopy(model).train()                   # the counter does not see into eval mode's fused transformer
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        z, a = model.encode(batch.views[:, :M]), model.embed(batch.actions)
        model.aggregate(z, a[:, :M - 1])
    return counter.get_total_flops() / 2 / len(batch.views)


PROBES = {"classify": probe_classify, "knn": probe_knn, "action": probe_action, "parameters": probe_parameters,
          "path": probe_path, "invariance": probe_invariance, "retrieval": probe_retrieval,
          "transfer": probe_transfer, "linear": probes_regions.probe_linear, "cls": probes_regions.probe_cls,
          "finetune": probes_regions.probe_finetune}
APPLIES = {"saccade": ("classify", "knn", "action", "parameters", "path"),
           "rotation": ("classify", "knn", "action", "parameters", "path", "invariance", "retrieval"), "augment": ("classify", "knn", "action", "parameters"),
           "regions": ("linear", "knn", "cls")}
ON_REQUEST = {"saccade": ("transfer",), "regions": ("finetune",)}               # probes that are run only if asked for


def regression(probe, predicts, features, x, y, setup):
    """A row: the paper's head for `predicts`, trained on x[0], y[0] and scored by R^2 on x[1], y[1]."""
    kind = REGRESSORS[predicts]
    head, epochs = fit_head(kind, x[0], y[0], y[0].shape[-1], F.mse_loss, setup)
    with torch.inference_mode():
        scores = r2(head(x[1]).flatten(0, 1), y[1].flatten(0, 1))
    return row(probe, predicts, features, kind, epochs, "R2", scores.mean().item()) | dict(per_dimension=scores.tolist())


def fit_head(kind, x, y, d_out, loss, setup):
    """A trained head of this kind and the epochs it took."""
    make, epochs = HEADS[kind]
    epochs = setup.probe_epochs or (epochs // QUICK_SHARE if setup.quick and kind == "mlp" else epochs)
    return fit(make(x.shape[-1], d_out), x, y, loss, epochs, seed=setup.seed, device=setup.device), epochs


def row(probe, predicts, features, head, epochs, unit, value):
    """One line of the table."""
    return {"probe": probe, "predicts": predicts, "from": features, "head": head, "epochs": epochs, "unit": unit, "value": value}


# ---------------------------------------------------------------- the two models, the table

def settle_batchnorm(model, views, M):
    """Give an untrained model the BatchNorm statistics of its own activations, if it has any BatchNorm; no weight moves.

    Without this the comparison would flatter training: an untrained encoder under eval() is not normalised at all."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return model
    model.train()
    for module in norms:
        module.reset_running_stats()
        module.momentum = None                             # a plain average over the batches, without a trace of the initial values
    with torch.no_grad():
        for i in range(SETTLE_BATCHES):
            seed_all(i)
            batch = views(torch.randint(len(views), (256,)), M)
            model(batch)
    return model


def measure_views(model, setup):
    """Features of both splits for the modes whose samples are sequences of views."""
    return [extract(model, setup.views[split], setup.lengths, setup.device, samplings=samplings, seed=setup.seed + i,
                    only_agg=setup.probes == ["transfer"], amp=setup.amp, what=f"{split} features")
            for i, (split, samplings) in enumerate((("train", setup.samplings), ("val", 1)))]


# What a mode measures, draws and looks at while it trains.
MEASURE = dict.fromkeys(("saccade", "rotation", "augment"), measure_views) | {"regions": probes_regions.measure_features}
DRAW = dict.fromkeys(("saccade", "rotation", "augment"), figures.draw_all) | {"regions": figures_regions.draw_all}


def measure(model, setup):
    """All rows of one model."""
    if setup.compile:
        model.representation.compile()
    train, val = MEASURE[setup.mode](model, setup)
    setup.model = model                                    # for the few probes that need more than features
    return [r for probe in setup.probes for r in PROBES[probe](train, val, setup)]


def evaluate(options):
    """Load the checkpoint, probe it and a randomly initialised twin, print and keep the table."""
    started, run_dir = time.monotonic(), Path(options.checkpoint).parent
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise BadInput(f"--json {options.json}: its folder does not exist; make it first")
    if options.json and Path(options.json).is_dir():
        raise BadInput(f"--json {options.json}: is a folder; name a file in it")
    checkpoint = load_checkpoint(options.checkpoint)
    changes = {k: v for k in ("data_dir", "limit") if (v := getattr(options, k)) is not None}
    if options.data_dir and not options.dataset:
        changes["download"] = False                        # where the run's data moved to: a wrong folder is to be said, not filled
    config, device = config_of(checkpoint, **changes), pick_device(options.device)
    probes, data = choose_probes(options, config)
    lengths = sorted({*(options.views or LENGTHS.get(config.mode, (1,))), *([config.views] if "invariance" in probes else [])})
    settings.check(dataclasses.replace(config, views=lengths[-1]))       # before data is rendered: has an object so many views?
    views = {split: build_views(data, split, device) for split in ("train", "val")}
    setup = SimpleNamespace(mode=config.mode, amp=options.amp and device.type == "cuda", views=views, lengths=lengths, device=device, seed=config.seed,
                            probes=probes, quick=config.quick, samplings=options.samplings, probe_epochs=options.probe_epochs, M_train=config.views,
                            compile=options.compile, row=row)

    model = build_model(config, views["val"].groups)
    restore(model, checkpoint)
    rows = measure(model.to(device), setup)
    untrained = settle_batchnorm(build_model(config, views["val"].groups).to(device), views["train"], config.views)
    paper = paper_numbers(config) if data.dataset == config.dataset else {}
    for r, other in zip(rows, measure(untrained, setup)):
        r["untrained"], r["paper"] = other["value"], paper.get((r["probe"], r["predicts"], r["from"]))

    print(table(rows))
    print(f"{len(views['train']):,} training and {len(views['val']):,} validation samples of {len(views['val'].classes):,} classes; "
          f"{options.samplings} view samplings of a training sample; {time.monotonic() - started:.0f} s on {device}")
    result = dict(checkpoint=str(options.checkpoint), step=checkpoint["step"], config=checkpoint["config"], device=str(device),
                  dataset=data.dataset, classes=len(views["val"].classes), n_train=len(views["train"]), n_val=len(views["val"]),
                  samplings=options.samplings, seconds=round(time.monotonic() - started, 1), rows=rows)
    name = "-".join(["probes", *(options.probe or []), *([options.dataset] if options.dataset else [])])    # a part does not replace the whole
    save_atomically(Path(options.json or run_dir / f"{name}.json"), lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
    if options.figures:
        for figure in DRAW[config.mode](model, views["val"], config, rows, run_dir):
            print(f"drew {figure}")
        print(f"wrote {write_report(run_dir, result)}")
    return 0


ONLINE_LIMIT = 2000             # samples of each split that an online probe looks at


@torch.compiler.set_stance("force_eager")        # batches of other sizes would each cost minutes of compiling
def online(model, views, config, device, due=True):
    """Cheap probes during training (--probe-every), on the encoder as it is: k-NN, and R^2 of the action where there is one.

    views: {"train", "val"} samplers.  Not the paper's protocol: fewer samples, shorter heads. NaN unless due."""
    look, columns = ONLINE[config.mode]
    if not due:
        return dict.fromkeys(columns, float("nan"))
    some = {split: torch.linspace(0, len(v) - 1, min(ONLINE_LIMIT, len(v))).long() for split, v in views.items()}
    return dict(zip(columns, look(model, views, config, device, some)))


def online_views(model, views, config, device, some):
    """k-NN top-1 of z, of z_agg, linear R^2 of the action."""
    M = config.views
    train, val = (extract(model, views[split], [M], device, seed=config.seed, index=some[split]) for split in ("train", "val"))
    name, columns = next(iter(views["val"].groups.items()))
    x, y = zip(*((f.z[:, :, :2].flatten(2), f.actions[:, :, 0, columns]) for f in (train, val)))
    setup = SimpleNamespace(probe_epochs=50, quick=False, seed=config.seed, device=device)
    return (knn_accuracy(train.z_clean[0], train.labels, val.z_clean[0], val.labels),
            knn_accuracy(train.z_agg[M][0], train.labels, val.z_agg[M][0], val.labels),
            regression("action", name, "z_1, z_2", x, y, setup)["value"])


ONLINE = dict.fromkeys(("saccade", "rotation", "augment"), (online_views, ("knn_z", "knn_z_agg", "action_r2")))
ONLINE["regions"] = probes_regions.online_regions, ("knn_patches", "knn_cls")


def choose_probes(options, config):
    """Which probes to run, and the Config of the data they run on: the run's own, or for `transfer` another's."""
    offered = (*APPLIES[config.mode], *ON_REQUEST.get(config.mode, ()))
    own_table = config.mode == "regions" or not options.dataset                      # a ViT's probes work on any images
    probes = list(options.probe or (APPLIES[config.mode] if own_table else ["transfer"]))
    for probe in set(probes) - set(offered):
        raise BadInput(f"--probe {probe}: does not apply to mode {config.mode}; choose from {', '.join(offered)}")
    if config.mode != "regions" and ("transfer" in probes) != bool(options.dataset) or ("transfer" in probes and len(probes) > 1):
        raise BadInput("--probe transfer: stands alone and needs --dataset, the data set to transfer to")
    if not options.dataset:
        if options.image_size or options.patch_size:
            raise BadInput("--image-size and --patch-size: only with --probe transfer; the run's own sizes come from its checkpoint")
        return probes, config
    if options.figures:
        raise BadInput("--figures: shows the run's own data; leave it out with --dataset")
    if config.mode == "regions":
        if options.image_size or options.patch_size:
            raise BadInput("--image-size and --patch-size: a ViT's are fixed when it is built; leave them out")
        return probes, dataclasses.replace(config, dataset=options.dataset)
    sizes = settings.preset(options.dataset, config.mode) | {k: v for k in ("image_size", "patch_size") if (v := getattr(options, k))}
    return probes, settings.check(dataclasses.replace(config, dataset=options.dataset, image_size=sizes["image_size"], patch_size=sizes["patch_size"],
                                                      saliency=options.saliency or config.saliency))


def table(rows):
    """Rows as aligned text."""
    lines = [("probe", "predicts", "from", "head", "epochs", "unit", "trained", "untrained", "paper")]
    for r in rows:
        digits = 1 if r["unit"] == "top-1 %" else 3
        value, untrained, paper = ("-" if v is None else f"{v:.{digits}f}" for v in (r["value"], r["untrained"], r["paper"]))
        lines.append((r["probe"], r["predicts"], r["from"], r["head"], str(r["epochs"]), r["unit"], value, untrained, paper))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def parse(argv=None):
    """Options from the command line."""
    p = argparse.ArgumentParser(prog="evaluate.py", description="Probe a trained model.")
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's last.pt; settings come from it")
    p.add_argument("--probe", nargs="+", choices=PROBES, help="which probes (default: all that apply to the run's mode)")
    p.add_argument("--views", nargs="+", type=int, metavar="M", help="inference lengths M_val (default: the paper's for the mode)")
    p.add_argument("--probe-epochs", type=int, default=0, metavar="N",
                   help="epochs of every head (default: the paper's; a fifth of them for MLP heads of a --quick run)")
    p.add_argument("--samplings", type=int, default=4, metavar="S", help="view samplings of each training sample (default: 4)")
    p.add_argument("--data-dir", metavar="DIR", help="where the data is now, if it moved")
    p.add_argument("--limit", type=int, metavar="N", help="use N images or objects of each split")
    p.add_argument("--dataset", choices=settings.DATASETS, help="probe on another data set: with --probe transfer, or any probe of mode regions")
    p.add_argument("--image-size", type=int, metavar="N", help="with --probe transfer: its image size (default: its preset's)")
    p.add_argument("--patch-size", type=int, metavar="N", help="with --probe transfer: its patch size (default: its preset's)")
    p.add_argument("--saliency", metavar="S", help="with --probe transfer: its saliency maps, as train.py's --saliency (default: the run's)")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast, on CUDA")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the encoder")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    p.add_argument("--json", metavar="FILE", help="where the numbers go (default: probes.json in the run's folder, or probes-PROBE.json for some of them)")
    p.add_argument("--figures", action="store_true", help="draw the figures and report.html into the run's folder")
    options = p.parse_args(argv)
    if options.views and min(options.views) < 1:
        raise BadInput(f"--views {min(options.views)}: M_val must be at least 1")
    if options.samplings < 1 or options.probe_epochs < 0 or (options.limit or 0) < 0:
        raise BadInput("--samplings must be at least 1, --probe-epochs and --limit at least 0")
    return options


def main(argv=None):
    """Exit status 0, or 2 for bad input."""
    try:
        return evaluate(parse(argv))
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("error: out of memory; lower --limit or --samplings, or use --device cpu", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
