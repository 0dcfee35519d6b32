"""Every field of a config, with its default, meaning and unit (`validation` has the rules).

A file in configs/ starts from `base_config()`, changes what it is about, and returns a locked
ConfigDict, so that a misspelt override is refused. Durations end in `_steps` or `_epochs`; where
both exist, None leaves the choice to the other.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from hjepa_jax.config.fields import flatten

# An ml_collections.ConfigDict, whose fields no type checker knows.
Config = Any

# Fields that may differ between a run and its continuation: they change what is said about the
# run, how fast it goes or where its data lies, not what it computes.
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

# Fields that a continuation may change where no update that was made would have been another one.
SCHEDULE_FIELDS = (
    "optim.decay_epochs",
    "optim.ema_momentum",
    "optim.final_learning_rate",
    "optim.final_weight_decay",
    "optim.learning_rate",
    "optim.max_ema_momentum",
    "optim.warmup_epochs",
    "optim.weight_decay",
    "train.num_epochs",
    "train.num_steps",
)

# Fields that came later than others. A run without them did what their defaults do, so that its
# config.json may lack them.
ADDED_FIELDS = (
    "data.local_crop_scale",
    "data.local_patches",
    "data.local_size",
    "data.local_views",
    "loss.agreement_weight",
    "loss.cross_view",
    "loss.local_weight",
    "loss.spread_weight",
    "mask.num_masks",
    "model.drop_path",
    "model.gelu",
    "model.global_level",
    "model.global_target",
    "model.layer_norm_epsilon",
    "model.layer_scale",
    "model.level_depths",
    "model.num_registers",
    "model.predictor_mode",
    "model.projection",
    "model.pyramid",
    "model.target",
    "model.target_layers",
    "optim.decay_epochs",
    "optim.kind",
    "optim.muon_momentum",
    "train.init_from",
)

# Fields that are gone, with the value at which they did nothing: a config.json may have them so.
REMOVED_FIELDS = {"model.expander_width": 0}


def base_config() -> Config:
    """The defaults. Values that experiments chose are in configs/, not here."""
    c = ConfigDict()
    c.seed = 0  # of parameters, masks, augmentation and data order
    c.platform = "auto"  # auto | cpu | cuda | rocm | tpu | metal | mps

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
    c.data.local_views = 0  # V, further crops of each image: they predict the global level, agree
    c.data.local_size = 16  # pixels per side of such a crop, as the model sees it
    c.data.local_crop_scale = (0.1, 0.4)  # its area, fraction of the image
    c.data.local_patches = placeholder(int)  # of each, what is seen, at random; None: all
    c.data.horizontal_flip = 0.5  # probability
    c.data.vertical_flip = 0.0  # probability
    c.data.brightness = 0.2  # factor uniform in [1 - s, 1 + s]
    c.data.contrast = 0.2
    c.data.saturation = 0.2
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
    c.model.num_levels = 2  # L; level l has cells of 2^l x 2^l patches
    c.model.num_summary_tokens = 4  # R
    c.model.num_registers = 0  # further such tokens, that nobody reads
    c.model.positions = "learned"  # learned (from sine-cosine on) | sincos2d (fixed) | rope2d
    # Of the encoder: initial factor of each residual branch, per feature, 0 for none; probability
    # to leave out a branch of the last block (of the first: 0).
    c.model.layer_scale = 0.0
    c.model.drop_path = 0.0
    c.model.gelu = "tanh"  # activation of the encoder: tanh (approximate, fast) | erf (exact)
    c.model.layer_norm_epsilon = 1e-6  # of the encoder; added to variances
    c.model.remat = False  # compute blocks again in the backward pass: less memory, slower
    c.model.dtype = "float32"  # of matrix products: float32 | bfloat16; parameters are float32
    c.model.predictor_width = 96
    c.model.predictor_depth = 4
    c.model.predictor_num_heads = 3
    c.model.predictor_mode = "self"  # who attends: self (all) | blocks (each its own) | cross
    c.model.global_level = False  # one query more, for the whole image
    c.model.global_target = "patches"  # what that is the mean of: patches | summary (tokens)
    # Hidden width and width of the features in which the views of an image agree, if they must.
    c.model.projection = (512, 256)
    c.model.pyramid = "none"  # add | concat: levels inform those below them, on both sides
    c.model.target = "ema"  # ema | online: no EMA, gradients flow through both sides (sigreg)
    # Of each level, the block of the target encoder (from 1) that its targets come from; None: the
    # last, as for the global level. They are the mean of that block and the k - 1 before it.
    c.model.level_depths = placeholder(tuple)
    c.model.target_layers = 1  # k

    c.mask = ConfigDict()
    # What is hidden. multiblock: M blocks of whole cells of align_level; hierarchical: block m of
    # whole cells of level m mod L, larger by progression; random: scattered cells of align_level.
    c.mask.kind = "multiblock"
    c.mask.num_blocks = 4  # M, target blocks per image; random: always one set of cells
    c.mask.num_masks = 1  # per image and step, whose targets are computed once
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
    c.loss.cross_view = 0.0  # share of the global loss whose target is a second augmentation
    c.loss.local_weight = 1.0  # of what local views (data.local_views) predict
    # Of what pulls the projected summary tokens of an image's views together (0: no projection),
    # and of what keeps those of different images, of a part of a batch, apart.
    c.loss.agreement_weight = 0.0
    c.loss.spread_weight = 0.5
    c.loss.regularizer = "vicreg"  # vicreg | sigreg (to a standard normal) | none
    # Multiplies the two terms of vicreg, or sigreg, which grows with its rows: the images of a part
    # of a batch (optim.accumulation_steps) times mask.num_masks.
    c.loss.regularizer_weight = 0.05
    c.loss.variance_weight = 25.0  # of vicreg
    c.loss.covariance_weight = 1.0  # of vicreg
    c.loss.num_slices = 256  # of sigreg: random directions, drawn anew in each step
    c.loss.regularized = "summary"  # summary (each token) | context (mean of visible tokens) | both

    c.optim = ConfigDict()
    # adamw | muon: the weight matrices within encoder, predictor and projection move along their
    # orthogonalized momentum, everything else by AdamW; at the same rate and decay.
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
    c.optim.max_ema_momentum = 1.0  # where that schedule is above, this
    c.optim.accumulation_steps = 1  # parts of a batch whose gradients are averaged

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
    # Pictures of what the model sees, in TensorBoard: as far as 2 % of the time allows, and at the
    # end; 0: never.
    c.log.figures_every_epochs = 5.0
    c.log.report = True  # write report.md and report.html when the run ends
    return c


def encoder_size(config: Config) -> tuple[int, int, int]:
    """Width, depth and heads of the encoder: those of `model.name` where not given."""
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
