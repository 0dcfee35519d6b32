"""Every field of a config, with its default, meaning and unit (`validation` has the rules).

A file in configs/ starts from `base_config()`, changes what it is about, and returns a locked
ConfigDict, so that a misspelt override is refused. Durations end in `_steps` or `_epochs`; where
both exist, None leaves the choice to the other.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from hjepa_jax.config.fields import flatten

# An ml_collections.ConfigDict; type checkers do not know its fields.
Config = Any

# Fields that may differ between a run and its continuation: they change the log, the speed or the
# place of the data, and no result.
FREE_FIELDS = (
    "data.dir",
    "data.num_workers",
    "eval.",
    "log.",
    "model.remat",
    "parallel.",
    "platform",
    "train.checkpoint_every_epochs",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.max_nonfinite_steps",
    "train.on_collapse",
    "train.steps_per_call",
)

# Fields that a continuation may change, if no update so far would have been another one.
SCHEDULE_FIELDS = (
    "optim.decay_epochs",
    "optim.ema_momentum",
    "optim.final_learning_rate",
    "optim.final_weight_decay",
    "optim.learning_rate",
    "optim.warmup_epochs",
    "optim.weight_decay",
    "train.num_epochs",
    "train.num_steps",
)

# Removed fields, with the value at which they did nothing: a config.json may hold this value.
REMOVED_FIELDS = {
    "loss.cross_view": 0.0,
    "loss.local_weight": 1.0,
    "mask.num_masks": 1,
    "model.expander_width": 0,
    "model.global_level": False,
    "model.global_target": "patches",
    "model.level_depths": None,
    "model.target_layers": 1,
    "optim.max_ema_momentum": 1.0,
}


def base_config() -> Config:
    """The defaults. Values that experiments chose are in configs/, not here."""
    c = ConfigDict()
    c.seed = 0  # of parameters, masks, augmentation and data order
    c.platform = "auto"  # auto | cpu | cuda | metal | mps

    c.data = ConfigDict()
    c.data.source = "tfds:cifar10"  # tfds:<name> | shapes | npz:<file> | folder:<directory>
    c.data.dir = placeholder(str)  # where TFDS keeps prepared sets; None: TFDS_DATA_DIR or ~
    c.data.streaming = "auto"  # always | never | auto: where decoded images are more than 8 GiB
    c.data.num_workers = 2  # processes that decode streamed images; 0: a thread of the run
    c.data.max_labelled = 20_000  # of a streamed set: images per split kept in memory for probes
    c.data.train_split = placeholder(str)  # of a streamed TFDS set, may lack labels; None: train
    # A file of class names: a streamed TFDS set has only these. A relative path counts from the
    # current folder, or else from the folder of the config file.
    c.data.class_list = placeholder(str)
    c.data.image_size = 32  # pixels per side that the model sees; stored images are resized
    c.data.mean = (0.491, 0.482, 0.447)  # per channel, of pixels in [0, 1]
    c.data.std = (0.247, 0.243, 0.262)
    c.data.crop_scale = (0.6, 1.0)  # area of the random crop, fraction of the image
    c.data.crop_ratio = (0.75, 1.3333)  # its width / height
    c.data.local_views = 0  # V, further crops of each image, which agree with the masked view
    c.data.local_size = 16  # pixels per side of such a crop, as the model sees it
    c.data.local_crop_scale = (0.1, 0.4)  # its area, fraction of the image
    c.data.local_patches = placeholder(int)  # patches seen of each local view, at random; None: all
    c.data.horizontal_flip = 0.5  # probability
    c.data.vertical_flip = 0.0  # probability
    c.data.brightness = 0.2  # factor uniform in [1 - s, 1 + s]
    c.data.contrast = 0.2
    c.data.saturation = 0.2
    c.data.hue = 0.0  # shift uniform in [-h, h], fraction of the colour circle; at most 0.5
    c.data.jitter_probability = 1.0  # of these four changes of colour, all or none
    c.data.grayscale = 0.0  # probability
    c.data.blur = 0.0  # probability of a Gaussian blur
    c.data.blur_sigma = (0.1, 2.0)  # its standard deviation, pixels
    c.data.solarize = 0.0  # probability of inverting the pixels of at least half brightness

    c.model = ConfigDict()
    c.model.name = "vit_tiny"  # sets width, depth and heads, where those are None
    c.model.width = placeholder(int)
    c.model.depth = placeholder(int)
    c.model.num_heads = placeholder(int)
    c.model.mlp_ratio = 4.0
    c.model.patch_size = 4  # pixels per side of a patch
    c.model.stem = "linear"  # patches to tokens: linear | hmlp (convolutions within each patch)
    c.model.num_levels = 2  # L; level l has cells of 2^l x 2^l patches
    c.model.num_summary_tokens = 4  # R
    c.model.num_registers = 0  # further such tokens, which no loss and no probe reads
    c.model.positions = "learned"  # learned (from sine-cosine on) | sincos2d (fixed) | rope2d
    # Encoder: initial factor of each residual branch, per feature; 0 = none.
    c.model.layer_scale = 0.0
    # Encoder: probability to leave out a branch of the last block; 0 at the first, linear between.
    c.model.drop_path = 0.0
    c.model.remat = False  # compute blocks again in the backward pass: less memory, slower
    c.model.dtype = "float32"  # of matrix products: float32 | bfloat16; parameters are float32
    c.model.predictor_width = 96
    c.model.predictor_depth = 4
    c.model.predictor_num_heads = 3
    c.model.predictor_mode = "self"  # who attends: self (all) | blocks (each its own) | cross
    # Hidden width and output width of the projection, where the views of an image agree.
    c.model.projection = (512, 256)
    c.model.projection_input = "summary"  # summary (tokens) | summary+patches (and their mean)
    c.model.pyramid = "none"  # add | concat: levels inform those below them, on both sides
    c.model.target = "ema"  # ema | online: no EMA, gradients flow through both sides (sigreg)

    c.mask = ConfigDict()
    # multiblock (M blocks of whole cells of align_level) | hierarchical (block m has whole cells of
    # level m mod L, and grows by progression) | random (scattered cells of align_level)
    c.mask.kind = "multiblock"
    c.mask.num_blocks = 4  # M, target blocks per image; random: always one set of cells
    c.mask.scale = (0.15, 0.25)  # area of a block (hierarchical: of level 0), or all of random's
    c.mask.progression = ("geometric", 1.5)  # hierarchical: geometric | linear, level 1 / level 0
    c.mask.aspect_ratio = (0.75, 1.5)  # height / width of a target block; random: not read
    c.mask.context_scale = (0.85, 1.0)  # area of the context block, before targets are removed
    c.mask.context_aspect_ratio = (0.75, 1.5)
    # Targets are whole cells of this level; None: L - 1. hierarchical: not read.
    c.mask.align_level = placeholder(int)
    c.mask.num_context = placeholder(int)  # K, context tokens kept; None: the expected number
    c.mask.min_coverage = 1.0  # fraction of a cell that must be hidden for it to be a target

    c.loss = ConfigDict()
    c.loss.kind = "smooth_l1"  # smooth_l1 | mse | cosine
    c.loss.level_weights = placeholder(tuple)  # w_l, finest first; None: 1 each
    c.loss.summary_weight = 1.0  # of the pass that sees the summary tokens only; 0: no such pass
    # agreement pulls the projections of an image's views together; 0 = no projection. spread keeps
    # the projections of different images apart, within a part of a batch.
    c.loss.agreement_weight = 0.0
    c.loss.spread_weight = 0.5
    # Weight of the EMA encoder's view of the whole image in the mean direction of the agreement, in
    # which every other view has weight 1; 0 = none.
    c.loss.teacher_weight = 0.0
    # Second moment that spread compares: batch (of each view) | views (of all views together) |
    # running (as views, averaged over batches: 0.9 of the old one; a tenth of the gradient).
    c.loss.spread_moment = "batch"
    c.loss.regularizer = "vicreg"  # vicreg | sigreg (to a standard normal) | none
    # Multiplies the two terms of vicreg, or sigreg. sigreg grows with the number of images in a
    # part of a batch (optim.accumulation_steps).
    c.loss.regularizer_weight = 0.05
    c.loss.variance_weight = 25.0  # of vicreg
    c.loss.covariance_weight = 1.0  # of vicreg
    c.loss.num_slices = 256  # of sigreg: random directions, drawn anew in each step
    c.loss.regularized = "summary"  # summary (each token) | context (mean of visible tokens) | both

    c.optim = ConfigDict()
    # adamw | muon (weight matrices inside the networks move along their orthogonalized momentum,
    # all other parameters by AdamW, at the same rate and decay)
    c.optim.kind = "adamw"
    c.optim.muon_momentum = 0.95
    c.optim.learning_rate = 1e-3  # peak
    c.optim.final_learning_rate = 0.0
    c.optim.warmup_epochs = 1.0
    c.optim.decay_epochs = placeholder(float)  # the last, of a falling rate; None: after warm-up
    c.optim.weight_decay = 0.05
    c.optim.final_weight_decay = placeholder(float)  # cosine towards it; None: constant
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.clip_norm = 3.0  # global gradient norm; 0: no clipping
    c.optim.ema_momentum = (0.98, 0.98, "constant")  # start, end, constant | linear | cosine
    c.optim.accumulation_steps = 1  # parts of a batch; their gradients are averaged

    c.train = ConfigDict()
    c.train.batch_size = 256  # images per update, global
    c.train.num_epochs = 20.0
    c.train.num_steps = placeholder(int)  # wins over num_epochs
    c.train.init_from = placeholder(str)  # another run's workdir: start from its parameters
    c.train.steps_per_call = 1  # updates per dispatch to the device
    c.train.checkpoint_every_epochs = 1.0
    c.train.checkpoint_every_steps = placeholder(int)  # wins over checkpoint_every_epochs
    c.train.keep_checkpoints = 2  # newest kept, beside the best by k-NN
    c.train.max_nonfinite_steps = 10  # of a run: left out and counted; one more ends the run
    c.train.on_collapse = "warn"  # of the target features: warn | stop | ignore

    c.eval = ConfigDict()
    c.eval.every_epochs = 1.0  # k-NN on held-out training images; 0: never
    c.eval.knn_bank_size = 10_000  # training images that it compares with
    c.eval.num_val = 5_000  # training images held out from probes for choosing (fixed seed)
    c.eval.batch_size = 256
    c.eval.probe_at_end = True  # linear and k-NN on the test set after the last step

    c.parallel = ConfigDict()
    c.parallel.cpu_devices = 1  # devices that the CPU poses as; a batch is split over all devices
    c.parallel.fsdp = 1  # devices that share one copy of parameters, EMA and optimizer state

    c.log = ConfigDict()
    c.log.every_steps = 50
    c.log.tensorboard = True
    # Epochs between pictures in TensorBoard (as often as 2 % of the time allows, and at the end);
    # 0 = never.
    c.log.figures_every_epochs = 5.0
    c.log.report = True  # write report.md and report.html when the run ends
    return c


def encoder_size(config: Config) -> tuple[int, int, int]:
    """Width, depth and heads of the encoder; `model.name` fills in the fields that are None."""
    given = (config.model.width, config.model.depth, config.model.num_heads)
    named = SIZES[config.model.name]
    return tuple(n if g is None else g for g, n in zip(given, named, strict=True))  # pyright: ignore


def differing_fields(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Fields that matter to results in which two configs (plain nested dicts) differ."""
    old, new = flatten(old), flatten(new)
    missing = object()
    return [
        field
        for field in sorted(old.keys() | new.keys())
        if old.get(field, missing) != new.get(field, missing) and not field.startswith(FREE_FIELDS)
    ]


# name -> width, depth, heads
SIZES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
}
