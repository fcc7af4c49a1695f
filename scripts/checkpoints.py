"""Checkpoints: plain dicts of tensors and values that load without running code."""
import argparse
import json
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from descriptors import InputError


def read_checkpoint(file):
    """Dict of a checkpoint of this script or of the published ISC21 weights; tensors on the CPU.

    Only tensors, plain containers and argparse.Namespace are unpickled; anything else is refused.
    """
    if str(file).endswith(".safetensors"):
        return read_safetensors(Path(file))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise InputError(f"{file} is not a readable checkpoint") from None
        raise InputError(f"{file} holds an object of type {found[1]} and was not loaded: it could run code; save it "
                         "again as a plain dict of tensors") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{file} is not a readable checkpoint: {(str(error).splitlines() or ['empty'])[0]}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(f"{file} is not a checkpoint: it has no 'state_dict'")
    state = {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
    args = checkpoint.get("args") or {}
    return checkpoint | {"state_dict": state, "args": vars(args) if isinstance(args, argparse.Namespace) else args}


def read_safetensors(file):
    """The same of weights that --mode export wrote, with config.json beside them."""
    config = file.with_name("config.json")
    try:
        state, settings = load_file(file), json.loads(config.read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{file} with {config} cannot be read: {str(error).splitlines()[0]}") from None
    return {"state_dict": state, "args": settings, "arch": settings.get("arch"), "preprocess": settings,
            "contaminated": settings.get("contaminated")}


def load_weights(net, state, file):
    """Load strictly; say what does not fit."""
    own = net.state_dict()
    shapes = [f"{k} {list(state[k].shape)}, here {list(own[k].shape)}" for k in own
              if k in state and state[k].shape != own[k].shape]
    keys = [f"{k} missing" for k in own if k not in state] + [f"{k} unexpected" for k in state if k not in own]
    if shapes or keys:
        raise InputError(f"{file} does not fit this network ({len(shapes + keys)} differences): "
                         + "; ".join((shapes + keys)[:3])
                         + "; --dim differs?" * any(text.startswith(("fc.", "bn.")) for text in shapes))
    net.load_state_dict(state)


def newest_checkpoint(folder):
    """The checkpoint with most steps done: the last epoch's, or latest.pth.tar where that went further."""
    files = sorted(folder.glob("checkpoint_*.pth.tar"))[-1:] + list(folder.glob("latest.pth.tar"))
    steps_done = lambda file: read_checkpoint(file).get("step", 0)
    return max(files, key=steps_done) if len(files) > 1 else next(iter(files), None)
