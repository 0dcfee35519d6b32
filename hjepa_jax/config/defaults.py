"""Every field of a config: default, meaning, unit or range (rules: `validation`).

A file in configs/ starts from `base_config()`, changes some fields and returns a locked ConfigDict,
which refuses misspelt overrides. Durations end in `_steps` or `_epochs`. The comment of a field
follows one pattern, `meaning; unit or range; None = ...`, and is the text of its row in the docs.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from hjepa_jax.config.fields import amount, flatten, sides
from hjepa_jax.config.sizes import counts_of

# An ml_collections.ConfigDict; type checkers do not know its fields.
Config = Any

# Value of `data.mean` or `data.std` that asks for statistics of the training images.
AUTO = ("auto",)

# Fields that a resumed run may change at any time: they change the log, the speed or the place of
# the data, but no result.
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

# Fields that a resumed run may change if all updates so far would have been the same.
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

# Fields that older versions did not have, with the value that reproduces their behaviour.
ADDED_FIELDS = {"data.stored_area": 1.0}

# Removed fields, with the value that had no effect: a config.json may contain this value.
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


def _run(c: Config) -> None:
    """Adds the fields that apply to the whole run."""
    c.seed = 0  # seed of parameters, masks, augmentation and data order; 0 or more
    c.platform = "auto"  # backend of JAX: auto | cpu | cuda | rocm | tpu | metal | mps


def _data(c: Config) -> None:
    """Adds the fields of images and views."""
    c.data = ConfigDict()
    # tfds:<name> | shapes | npz:<file> | npy:<path> | folder:<path> | images:<path> (no labels)
    c.data.source = "tfds:cifar10"
    c.data.follow_links = False  # whether links out of the folder of images are followed
    # folder of prepared TFDS sets; None = $TFDS_DATA_DIR or ~/tensorflow_datasets
    c.data.dir = placeholder(str)
    # whether images are decoded during training: auto (if they exceed 8 GiB) | always | never
    c.data.streaming = "auto"
    c.data.num_workers = 2  # processes that decode streamed images; 0 = a thread of the run
    c.data.max_labelled = 20_000  # labelled images per split for probes; only if streamed
    # split of a streamed TFDS set to train on, labels optional; None = train
    c.data.train_split = placeholder(str)
    # file with class names, the only classes used of a streamed TFDS set; None = all
    # A relative path counts from the current folder, then from the folder of the config file.
    c.data.class_list = placeholder(str)
    # side of the images that the model sees, or (height, width); pixels
    c.data.image_size = sides(32)
    # largest area of a training image that crops are cut from; multiple of data.image_size's area
    # 1 = crops are cut from images that are already reduced to data.image_size.
    c.data.stored_area = 4.0
    # subtracted per channel; integer pixels as fractions of the largest value; auto = computed
    # Its length is the number of channels: 3 turns grey images into RGB.
    c.data.mean = (0.491, 0.482, 0.447)
    # divided by per channel; as data.mean
    c.data.std = (0.247, 0.243, 0.262)
    c.data.crop_scale = (0.6, 1.0)  # area of the random crop; fraction of the image
    c.data.crop_ratio = (0.75, 1.3333)  # width / height of the crop; 1 = ratio of the image
    c.data.local_views = 0  # V, further crops of each image; 0 = none
    # side of a further crop; pixels, or a fraction of the image's sides; None = size of the image
    c.data.local_size = amount(16)
    c.data.local_crop_scale = (0.1, 0.4)  # area of a further crop; fraction of the image
    # patches of a further crop that the encoder sees, at random; count or fraction; None = all
    c.data.local_patches = amount(None)
    c.data.horizontal_flip = 0.5  # probability of a left-right flip
    c.data.vertical_flip = 0.0  # probability of an upside-down flip
    c.data.brightness = 0.2  # s of a factor uniform in [1 - s, 1 + s]
    c.data.contrast = 0.2  # s of a factor uniform in [1 - s, 1 + s]
    c.data.saturation = 0.2  # s of a factor uniform in [1 - s, 1 + s]
    c.data.hue = 0.0  # h of a shift uniform in [-h, h]; fraction of the colour circle, at most 0.5
    c.data.jitter_probability = 1.0  # probability of the four colour changes above, all or none
    c.data.grayscale = 0.0  # probability of removing the colour
    c.data.blur = 0.0  # probability of a Gaussian blur
    c.data.blur_sigma = (0.1, 2.0)  # standard deviation of the blur; pixels
    c.data.solarize = 0.0  # probability of inverting the pixels of 0.5 and above


def _model(c: Config) -> None:
    """Adds the fields of the networks."""
    c.model = ConfigDict()
    c.model.name = "vit_tiny"  # size of the encoder: vit_tiny | vit_small | vit_base
    c.model.width = placeholder(int)  # features per token; None = from model.name
    c.model.depth = placeholder(int)  # blocks; None = from model.name
    c.model.num_heads = placeholder(int)  # attention heads; None = from model.name
    c.model.mlp_ratio = 4.0  # hidden width of an MLP / width of the encoder
    c.model.patch_size = 4  # side of a patch; pixels
    c.model.stem = "linear"  # patches to tokens: linear | hmlp (convolutions within each patch)
    c.model.num_levels = 2  # L; level l has cells of 2^l x 2^l patches
    c.model.num_summary_tokens = 4  # R, learned tokens that describe the whole image
    c.model.num_registers = 0  # extra tokens that no loss and no probe reads
    # position embeddings: learned (start as sincos2d) | sincos2d (fixed) | rope2d (rotary)
    c.model.positions = "learned"
    c.model.layer_scale = 0.0  # initial LayerScale factor of the encoder; 0 = none
    # probability to drop a branch of the last encoder block; rises from 0 at the first
    c.model.drop_path = 0.0
    # activation of the encoder: tanh (approximation, fast) | erf (exact, as in published encoders)
    c.model.gelu = "tanh"
    c.model.layer_norm_epsilon = 1e-6  # added to variances in the encoder; in (0, 1]
    c.model.remat = False  # recompute blocks in the backward pass: less memory, slower
    c.model.dtype = "float32"  # matrix products: float32 | bfloat16; parameters are float32
    c.model.predictor_width = 96  # features per token
    c.model.predictor_depth = 4  # blocks
    c.model.predictor_num_heads = 3  # attention heads
    # attention of the predictor: self (all tokens to all) | blocks (per target block) | cross
    c.model.predictor_mode = "self"
    # hidden and output width of the projection; used if loss.agreement_weight > 0
    c.model.projection = (512, 256)
    # input of the projection: summary (tokens) | summary+patches (and the mean of the patches)
    c.model.projection_input = "summary"
    c.model.pyramid = "none"  # feature pyramid, predictions and targets: none | add | concat
    # target encoder: ema | online (no EMA, gradient through both sides; needs sigreg)
    c.model.target = "ema"


def _mask(c: Config) -> None:
    """Adds the fields of the masks."""
    c.mask = ConfigDict()
    # kind of masks: multiblock | hierarchical | random
    # multiblock: M blocks of whole cells of align_level. hierarchical: block m has whole cells of
    # level m mod L. random: scattered cells of align_level.
    c.mask.kind = "multiblock"
    c.mask.num_blocks = 4  # M, target blocks per image; random always has one set
    # area of a block (hierarchical: of level 0; random: of all cells); fraction
    c.mask.scale = (0.15, 0.25)
    # growth of block areas per level: (geometric | linear, factor); only hierarchical
    c.mask.progression = ("geometric", 1.5)
    c.mask.aspect_ratio = (0.75, 1.5)  # height / width of a target block; 1 = ratio of the image
    # area of the context block before targets are removed; fraction
    c.mask.context_scale = (0.85, 1.0)
    # height / width of the context block; 1 = ratio of the image
    c.mask.context_aspect_ratio = (0.75, 1.5)
    c.mask.align_level = placeholder(int)  # level whose whole cells form the targets; None = L - 1
    # K, context tokens; count, or fraction of the patches; None = expected number of visible ones
    c.mask.num_context = amount(None)
    c.mask.min_coverage = 1.0  # smallest hidden fraction of a cell that is a target; in (0, 1]


def _loss(c: Config) -> None:
    """Adds the fields of the loss."""
    c.loss = ConfigDict()
    c.loss.kind = "smooth_l1"  # distance of prediction and target: smooth_l1 | mse | cosine
    c.loss.level_weights = placeholder(tuple)  # weight of each level, finest first; None = 1 each
    # weight of the prediction from summary tokens alone; 0 = no such pass
    c.loss.summary_weight = 1.0
    # weight of the agreement of the views of an image; 0 = no agreement and no projection
    c.loss.agreement_weight = 0.0
    # weight of the spread of different images; used if agreement_weight > 0
    c.loss.spread_weight = 0.5
    # weight of the EMA encoder's view of the whole image in the agreement; 0 = none
    # Every other view of the image has weight 1.
    c.loss.teacher_weight = 0.0
    # second moment that spread compares: batch (of each view) | views (all views) | running
    # running: the moment of all views, averaged over batches with decay 0.9.
    c.loss.spread_moment = "batch"
    # regularizer of the features: vicreg | sigreg (towards a standard normal) | none
    c.loss.regularizer = "vicreg"
    # weight of SIGReg, or factor of the two weights of VICReg
    # SIGReg grows with the images per part of a batch (optim.accumulation_steps).
    c.loss.regularizer_weight = 0.05
    c.loss.variance_weight = 25.0  # weight of VICReg's variance term
    c.loss.covariance_weight = 1.0  # weight of VICReg's covariance term
    c.loss.num_slices = 256  # random directions of SIGReg; new ones in each step
    # regularized features: summary (each token) | context (mean of the visible tokens) | both
    c.loss.regularized = "summary"


def _optim(c: Config) -> None:
    """Adds the fields of optimizer, schedules and EMA."""
    c.optim = ConfigDict()
    # optimizer: adamw | muon
    # Muon moves the weight matrices of encoder, predictor and projection along their
    # orthogonalized momentum; AdamW moves the other parameters. Both use the same learning rate
    # and weight decay.
    c.optim.kind = "adamw"
    c.optim.muon_momentum = 0.95  # momentum of Muon; in [0, 1)
    c.optim.learning_rate = 1e-3  # peak, after the warm-up
    c.optim.final_learning_rate = 0.0  # learning rate of the last step
    c.optim.warmup_epochs = 1.0  # length of the linear warm-up from 0; epochs
    # length of the final cosine decay; epochs; 0 = none; None = all epochs after the warm-up
    c.optim.decay_epochs = placeholder(float)
    c.optim.weight_decay = 0.05  # decoupled weight decay of the weight matrices
    # weight decay of the last step, at the end of a cosine schedule; None = constant
    c.optim.final_weight_decay = placeholder(float)
    c.optim.b1 = 0.9  # decay of AdamW's first moment; in [0, 1)
    c.optim.b2 = 0.95  # decay of AdamW's second moment; in [0, 1)
    c.optim.clip_norm = 3.0  # largest global gradient norm; 0 = no clipping
    # momentum of the EMA; (start, end, constant | linear | cosine), start and end in [0, 1]
    c.optim.ema_momentum = (0.98, 0.98, "constant")
    # gradient accumulation: number of parts of a batch; their gradients are averaged
    c.optim.accumulation_steps = 1


def _train(c: Config) -> None:
    """Adds the fields of length and checkpoints."""
    c.train = ConfigDict()
    c.train.batch_size = 256  # images per update, over all devices
    c.train.num_epochs = 20.0  # length of the run; epochs
    c.train.num_steps = placeholder(int)  # length of the run; updates; None = from num_epochs
    # work directory of a run that gives the initial parameters; None = random parameters
    c.train.init_from = placeholder(str)
    c.train.steps_per_call = 1  # updates per dispatch to the device; changes speed only
    c.train.checkpoint_every_epochs = 1.0  # epochs between checkpoints
    # updates between checkpoints; None = checkpoint_every_epochs
    c.train.checkpoint_every_steps = placeholder(int)
    c.train.keep_checkpoints = 2  # number of newest checkpoints to keep; the best is kept as well
    # steps with a non-finite loss that are skipped; one more ends the run
    c.train.max_nonfinite_steps = 10
    c.train.on_collapse = "warn"  # if the target features collapse: warn | stop | ignore


def _eval(c: Config) -> None:
    """Adds the fields of evaluation."""
    c.eval = ConfigDict()
    # labelled images for k-NN and probes, as in data.source; None = data.source
    c.eval.data = placeholder(str)
    c.eval.every_epochs = 1.0  # epochs between k-NN scores of held-out images; 0 = never
    c.eval.knn_bank_size = 10_000  # training images that k-NN compares with
    # training images held out for choosing hyper-parameters; at most a fifth
    c.eval.num_val = 5_000
    c.eval.batch_size = 256  # images per call when features are extracted
    c.eval.probe_at_end = True  # linear and k-NN probes on the test set after the last step


def _parallel(c: Config) -> None:
    """Adds the fields of several devices."""
    c.parallel = ConfigDict()
    c.parallel.cpu_devices = 1  # virtual devices of the CPU; a batch is split over all devices
    c.parallel.fsdp = 1  # devices that share one copy of parameters, EMA and optimizer state


def _log(c: Config) -> None:
    """Adds the fields of logs and reports."""
    c.log = ConfigDict()
    c.log.every_steps = 50  # updates between log lines
    c.log.tensorboard = True  # write TensorBoard event files
    # epochs between pictures in TensorBoard; 0 = never
    # At most 2 % of a run's time; the last pictures are always made.
    c.log.figures_every_epochs = 5.0
    c.log.report = True  # write report.md and report.html when the run ends


def base_config() -> Config:
    """Returns the defaults. Values that were chosen by experiments are in configs/."""
    c = ConfigDict()
    for add_fields in (
        _run, _data, _model, _mask, _loss, _optim, _train, _eval, _parallel, _log
    ):  # fmt: skip
        add_fields(c)
    return c


def encoder_size(config: Config) -> tuple[int, int, int]:
    """Width, depth and heads of the encoder; `model.name` fills in the fields that are None."""
    given = (config.model.width, config.model.depth, config.model.num_heads)
    named = SIZES[config.model.name]
    return tuple(n if g is None else g for g, n in zip(given, named, strict=True))  # pyright: ignore


def differing_fields(old: Config, new: Config) -> list[str]:
    """Returns the fields that affect results and differ between two configs.

    A count and a fraction of the same size are equal: 16 of 64 patches and 0.25.
    """
    was, now, counts = flatten(old.to_dict()), flatten(new.to_dict()), counts_of(new)
    same = {field for field, count in counts_of(old).items() if counts[field] == count}
    return [
        field
        for field in sorted(was)
        if was[field] != now[field] and field not in same and not field.startswith(FREE_FIELDS)
    ]


# name -> width, depth, heads
SIZES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
}
