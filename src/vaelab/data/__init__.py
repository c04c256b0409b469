"""Images from files to batches: readers, named data sets, splits and protocols, augmentation."""

from __future__ import annotations

from vaelab.data.augment import augment as augment
from vaelab.data.datasets import Dataset as Dataset
from vaelab.data.datasets import Split as Split
from vaelab.data.datasets import load as load
from vaelab.data.readers import Images as Images
