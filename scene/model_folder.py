# SPDX-License-Identifier: Apache-2.0
"""The folder of one trained model in the 3DGS layout: where each file is, and the small text files in it.

    MODEL/cfg_args, config.json, cameras.json, input.ply, metrics.jsonl, train.log, report.html
    MODEL/point_cloud/iteration_N/point_cloud.ply
    MODEL/checkpoints/N/
    MODEL/ranks/, strategy_history.jsonl          training on several processes
    MODEL/{train,test}/ours_N/{renders,gt}/00000.png
    MODEL/path/ours_N/{renders/00000.png,cameras.json,path.mp4}
    MODEL/results.json, per_view.json

Knows nothing of Gaussians or of the command line: configurations are mappings of plain values.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from scene.errors import InputError

if TYPE_CHECKING:  # the command line and the doctor work without numpy
    from scene.cameras import Camera

CONFIG_SCHEMA = "mask-grendel/config"
CONFIG_VERSION = 1
LARGEST_TEXT_BYTES = 1 << 20
SPLITS = ("train", "test")


def default_model_path(job_id: str = "") -> Path:
    """./output/ and ten characters: the beginning of the cluster's job id, or random ones (3DGS's rule)."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", job_id)[:10]
    return Path("output") / (name if name.strip(".") else uuid.uuid4().hex[:10])


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """Paths inside one model folder, and readers and writers of its text files."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> ModelFolder:
        """The folder, made if necessary, after a test that files can be written there.

        Raises:
            InputError: the folder cannot be made or written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path, prefix=".write-test-"):
                pass
        except (OSError, ValueError) as error:
            raise InputError(
                f"the model folder {path} cannot be written: {_cause(error)}. Choose another folder with -m, free some "
                "space, or change the folder's permissions."
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> ModelFolder:
        """An existing model folder.

        Raises:
            InputError: there is no such folder.
        """
        if not path.is_dir():
            what = "is a file, not a folder" if path.exists() else "does not exist"
            raise InputError(f"the model folder {path} {what}; give the folder that train.py wrote with -m")
        return cls(path)

    @property
    def cfg_args(self) -> Path:
        """Configuration in the form of the predecessors."""
        return self.path / "cfg_args"

    @property
    def config(self) -> Path:
        """Our whole configuration."""
        return self.path / "config.json"

    @property
    def cameras(self) -> Path:
        """Camera poses for viewers."""
        return self.path / "cameras.json"

    @property
    def input_ply(self) -> Path:
        """The point cloud the training started from."""
        return self.path / "input.ply"

    @property
    def metrics(self) -> Path:
        """One JSON object per line: everything measured during training."""
        return self.path / "metrics.jsonl"

    @property
    def train_log(self) -> Path:
        """What the terminal showed, with times."""
        return self.path / "train.log"

    @property
    def strategy_history(self) -> Path:
        """One JSON object per step: who drew what, and what it cost."""
        return self.path / "strategy_history.jsonl"

    def rank_log(self, rank: int) -> Path:
        """What a process other than the first would have shown on a terminal; its folder is made."""
        return self._rank_folder() / f"train-{rank}.log"

    def rank_metrics(self, rank: int) -> Path:
        """One JSON object per line: what one process measured of itself; its folder is made."""
        return self._rank_folder() / f"metrics-{rank}.jsonl"

    def _rank_folder(self) -> Path:
        folder = self.path / "ranks"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made: {_cause(error)}. Choose another folder with -m.") from error
        return folder

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, one folder for each iteration."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The offline report."""
        return self.path / "report.html"

    def results(self, split: str) -> Path:
        """Mean measures of a rendered set: results.json for test, results_train.json for train."""
        return self.path / ("results.json" if split == "test" else f"results_{split}.json")

    def per_view(self, split: str) -> Path:
        """Measures of each view: per_view.json for test, per_view_train.json for train."""
        return self.path / ("per_view.json" if split == "test" else f"per_view_{split}.json")

    def point_cloud(self, iteration: int) -> Path:
        """The model saved for an iteration."""
        return self.path / "point_cloud" / f"iteration_{iteration}" / "point_cloud.ply"

    def split_folder(self, split: str, iteration: int) -> Path:
        """Folder of everything rendered of a set ("train" or "test") or along a "path" at an iteration."""
        return self.path / split / f"ours_{iteration}"

    def renders(self, split: str, iteration: int) -> Path:
        """Folder of the rendered views 00000.png, 00001.png, ... in the order of the data set."""
        return self.split_folder(split, iteration) / "renders"

    def ground_truth(self, split: str, iteration: int) -> Path:
        """Folder of the photos that belong to `renders`, at the same size and under the same names."""
        return self.split_folder(split, iteration) / "gt"

    def saved_iterations(self) -> tuple[int, ...]:
        """Iterations with a saved model, ascending."""
        return _numbered(self.path / "point_cloud", "iteration_", "point_cloud.ply")

    def rendered_iterations(self, split: str) -> tuple[int, ...]:
        """Iterations of which a set was rendered, ascending."""
        return _numbered(self.path / split, "ours_", "renders")

    def find_iteration(self, wanted: int = -1) -> int:
        """The wanted saved iteration, or the newest for -1.

        Raises:
            InputError: nothing, or not this iteration, was saved.
        """
        saved = self.saved_iterations()
        if wanted in saved or (wanted == -1 and saved):
            return saved[-1] if wanted == -1 else wanted
        place = self.path / "point_cloud"
        if not saved:
            shards = next(place.glob("iteration_*/point_cloud_rk*_ws*.ply"), None)
            hint = f" ({shards.name} is one part of a model of Grendel-GS: merge its parts first)" if shards else ""
            raise InputError(f"no iteration_N/point_cloud.ply in {place}{hint}; train first, or give another -m")
        listed = ", ".join(map(str, saved))
        raise InputError(f"iteration {wanted} was not saved in {place}; saved are {listed}: choose with --iteration")

    def write_cfg_args(self, values: Mapping[str, Any]) -> None:
        """Writes plain values (numbers, text, Booleans, None, lists of them) as Namespace(name=value, ...)."""
        entries = ", ".join(f"{name}={value!r}" for name, value in values.items())
        write_text_atomically(self.cfg_args, f"Namespace({entries})")

    def read_cfg_args(self) -> dict[str, Any]:
        """The values in cfg_args, of ours or a predecessor's; only literals are understood, nothing is executed.

        Raises:
            InputError: the file is missing, too large, or anything but Namespace(name=literal, ...).
        """
        return parse_namespace(_read_text(self.cfg_args), self.cfg_args)

    def write_config(self, config: Mapping[str, Any], command: Sequence[str]) -> None:
        """Writes our configuration (JSON values, grouped) and the command line that led to it."""
        content = {"schema": CONFIG_SCHEMA, "version": CONFIG_VERSION, "command": list(command), "config": dict(config)}
        write_json_atomically(self.config, content)

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote: {"schema", "version", "command", "config"}.

        Raises:
            InputError: the file is missing, damaged, or of a newer version.
        """
        try:
            content = json.loads(_read_text(self.config))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.config} is not readable JSON ({error}); restore or delete the file") from error
        if not isinstance(content, dict) or content.get("schema") != CONFIG_SCHEMA:
            raise InputError(f"{self.config} is not a configuration of mask-grendel; restore or delete the file")
        version = content.get("version")
        if not isinstance(version, int) or not 1 <= version <= CONFIG_VERSION:
            raise InputError(f"{self.config} has version {version!r}, this program reads 1 to {CONFIG_VERSION}; update")
        if not isinstance(content.get("config"), dict):
            raise InputError(f"{self.config} holds no object 'config'; restore or delete the file")
        return content

    def stored_options(self, *, needed: bool = True) -> dict[str, Any]:
        """The stored configuration as flat values by flag name: from config.json, else from cfg_args.

        Raises:
            InputError: a file is unreadable, or both are missing and `needed` is true.
        """
        if self.config.is_file():
            groups = self.read_config()["config"].values()
            return {name: value for group in groups if isinstance(group, dict) for name, value in group.items()}
        if self.cfg_args.is_file():
            return self.read_cfg_args()
        if needed:
            raise InputError(
                f"{self.path} has neither config.json nor cfg_args, so the data set is unknown; give it with -s "
                "FOLDER, and --eval, --images, --resolution as in training"
            )
        return {}

    def camera_centers(self) -> list[list[float]]:
        """The positions in cameras.json, (N, 3) world units; none without such a file, or one of another form."""
        try:
            return [[float(value) for value in entry["position"]] for entry in json.loads(self.cameras.read_text())]
        except (OSError, ValueError, TypeError, KeyError):
            return []

    def write_cameras(self, train: Sequence[Camera], test: Sequence[Camera]) -> None:
        """Writes cameras.json as 3DGS does: test cameras first, camera-to-world poses, focal lengths in pixels."""
        entries = [camera_entry(index, camera) for index, camera in enumerate((*test, *train))]
        write_text_atomically(self.cameras, json.dumps(entries))


def camera_entry(index: int, camera: Camera) -> dict[str, Any]:
    """One object of cameras.json: position and rotation rows are camera-to-world; sizes in pixels as trained."""
    return {
        "id": index,
        "img_name": str(PurePosixPath(camera.name).with_suffix("")),
        "width": camera.width,
        "height": camera.height,
        "position": [float(value) for value in camera.center],
        "rotation": [[float(value) for value in row] for row in camera.rotation.T],
        "fy": float(camera.fy),
        "fx": float(camera.fx),
    }


def parse_namespace(text: str, path: Path) -> dict[str, Any]:
    """The keywords of a text Namespace(name=literal, ...) as a dictionary; `path` is for messages only.

    Raises:
        InputError: the text is anything else.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Namespace"):
            raise ValueError("it is not of the form Namespace(name=value, ...)")
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("it has entries without a name")
        if len({keyword.arg for keyword in call.keywords}) < len(call.keywords):
            raise ValueError("it names an entry twice")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as cfg_args: {error}. Nothing in it was executed. Give the values on the command "
            "line instead (-s, --eval, --images, --resolution) and move the file away."
        ) from error


def write_json_atomically(path: Path, content: Any) -> None:
    """Writes indented JSON so that readers see the old file or the whole new one."""
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Writes UTF-8 text to a temporary file beside `path`, flushes it to the disk and renames it.

    Raises:
        InputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {_cause(error)}. Free some space or choose another -m.") from error


def _read_text(path: Path) -> str:
    """The text of a small file.

    Raises:
        InputError: it is missing, larger than a configuration can be, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_TEXT_BYTES + 1)
        if len(content) > LARGEST_TEXT_BYTES:
            raise InputError(f"{path} is larger than {LARGEST_TEXT_BYTES} bytes, so no configuration; move it away")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text ({error}); restore or delete the file") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_cause(error)}; check the model folder given with -m") from error


def _numbered(folder: Path, prefix: str, content: str) -> tuple[int, ...]:
    """The numbers N of the sub-folders prefixN that hold `content`, ascending."""
    matches = ((re.fullmatch(prefix + r"(\d{1,18})", entry.name), entry) for entry in folder.glob(f"{prefix}*"))
    return tuple(sorted(int(match[1]) for match, entry in matches if match and (entry / content).exists()))


def _cause(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
