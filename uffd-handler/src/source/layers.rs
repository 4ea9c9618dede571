//! A whole memory: the chain of its layers, searched from the top down.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    DeltaLayer, Fingerprint, FlatLayer, Lookup, PageKind, PageSource, SourceError, ZeroMap,
};
use crate::seal::{Key, KeySource, NoKeys};
use crate::uffd::PAGE;

/// Most layers in a chain; lookups of absent pages cost one search per layer.
const MAX_LAYERS: usize = 32;

/// The files of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerFiles {
    /// Every page in its place; with the map of zero pages when one was stored beside it.
    Flat {
        /// The memory file.
        memory: PathBuf,
        /// Its zero map.
        zero_map: Option<PathBuf>,
    },
    /// Changed pages only.
    Delta {
        /// The pages.
        data: PathBuf,
        /// Their index.
        index: PathBuf,
    },
    /// Changed pages only, encrypted.
    EncryptedDelta {
        /// The pages.
        data: PathBuf,
        /// Their index.
        index: PathBuf,
        /// Name of the key that opens both.
        key: String,
    },
}

impl LayerFiles {
    /// The files, in the order [`OpenLayer::from_files`] wants them open.
    pub fn paths(&self) -> Vec<&Path> {
        match self {
            Self::Flat { memory, zero_map } => [Some(memory), zero_map.as_ref()]
                .into_iter()
                .flatten()
                .map(PathBuf::as_path)
                .collect(),
            Self::Delta { data, index } | Self::EncryptedDelta { data, index, .. } => {
                vec![data, index]
            }
        }
    }

    /// Name of the key it needs.
    pub fn key(&self) -> Option<&str> {
        match self {
            Self::EncryptedDelta { key, .. } => Some(key),
            Self::Flat { .. } | Self::Delta { .. } => None,
        }
    }
}

/// A layer ready to be read; cheap to clone, and shared by all VMs of a template.
#[derive(Clone)]
pub enum OpenLayer {
    /// A flat file.
    Flat(Arc<FlatLayer>),
    /// A delta.
    Delta(Arc<DeltaLayer>),
}

impl OpenLayer {
    /// Opens a layer by its paths.
    pub fn open(
        layer: &LayerFiles,
        memory_bytes: u64,
        keys: &dyn KeySource,
    ) -> Result<Self, SourceError> {
        let key = layer.key().map(|id| keys.key(id)).transpose();
        let key = key.map_err(|source| {
            let path = layer.paths().first().map(|p| p.to_path_buf()).unwrap_or_default();
            SourceError::Sealed { path, source }
        })?;
        let mut files = Vec::new();
        for path in layer.paths() {
            files.push(
                File::open(path)
                    .map_err(|source| SourceError::Open { path: path.to_path_buf(), source })?,
            );
        }
        Self::from_files(layer, files, key.as_ref(), memory_bytes)
    }

    /// Takes over files that were opened elsewhere, in the order of [`LayerFiles::paths`].
    pub fn from_files(
        layer: &LayerFiles,
        files: Vec<File>,
        key: Option<&Key>,
        memory_bytes: u64,
    ) -> Result<Self, SourceError> {
        let mut files = files.into_iter();
        let mut next = |path: &Path| {
            files.next().ok_or_else(|| SourceError::Open {
                path: path.to_path_buf(),
                source: std::io::ErrorKind::NotFound.into(),
            })
        };
        match layer {
            LayerFiles::Flat { memory, zero_map } => {
                let file = next(memory)?;
                let zero = match zero_map {
                    Some(path) => Some(ZeroMap::read(&next(path)?, path)?),
                    None => None,
                };
                if let (Some(zero), Some(path)) = (&zero, zero_map)
                    && zero.memory_pages() * PAGE != memory_bytes
                {
                    let (expected, found) = (memory_bytes, zero.memory_pages() * PAGE);
                    return Err(SourceError::Size { path: path.clone(), expected, found });
                }
                Ok(Self::Flat(Arc::new(FlatLayer::new(file, memory, memory_bytes, zero)?)))
            }
            LayerFiles::Delta { data, index } | LayerFiles::EncryptedDelta { data, index, .. } => {
                let layer = DeltaLayer::new(next(data)?, data, &next(index)?, index, key)?;
                if layer.memory_pages() * PAGE != memory_bytes {
                    let (expected, found) = (memory_bytes, layer.memory_pages() * PAGE);
                    return Err(SourceError::Size { path: index.clone(), expected, found });
                }
                Ok(Self::Delta(Arc::new(layer)))
            }
        }
    }

    fn source(&self) -> &dyn PageSource {
        match self {
            Self::Flat(layer) => &**layer,
            Self::Delta(layer) => &**layer,
        }
    }

    pub(crate) fn fingerprint(&self) -> Fingerprint {
        match self {
            Self::Flat(layer) => layer.fingerprint(),
            Self::Delta(layer) => layer.fingerprint(),
        }
    }
}

/// How the pages of a run are had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// They are zeros.
    Zero,
    /// They lie at this address of a mapping. Never to be read by code of this process.
    Mapped(*const u8),
    /// They have to be read: with this layer, from this place on.
    Read {
        /// Index into the chain, from the bottom.
        layer: usize,
        /// First place in that layer.
        place: u64,
    },
}

/// Consecutive pages that are had the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of pages, at least 1.
    pub pages: u64,
    /// How they are had.
    pub kind: RunKind,
}

/// The chain of layers of one guest's memory, bottom first.
#[derive(Clone)]
pub struct MemoryLayers {
    layers: Vec<OpenLayer>,
}

impl MemoryLayers {
    /// Opens all layers of a chain, bottom first, none of them encrypted.
    pub fn open(files: &[LayerFiles], memory_bytes: u64) -> Result<Self, SourceError> {
        Self::open_with(files, memory_bytes, &NoKeys)
    }

    /// Opens all layers of a chain, bottom first, with the keys they need.
    pub fn open_with(
        files: &[LayerFiles],
        memory_bytes: u64,
        keys: &dyn KeySource,
    ) -> Result<Self, SourceError> {
        let layers: Result<Vec<_>, _> =
            files.iter().map(|layer| OpenLayer::open(layer, memory_bytes, keys)).collect();
        Self::new(layers?)
    }

    /// Makes a chain of open layers, bottom first.
    pub fn new(layers: Vec<OpenLayer>) -> Result<Self, SourceError> {
        let flat_first = matches!(layers.first(), Some(OpenLayer::Flat(_)));
        let rest_delta = layers.iter().skip(1).all(|layer| matches!(layer, OpenLayer::Delta(_)));
        if !flat_first || !rest_delta || layers.len() > MAX_LAYERS {
            return Err(SourceError::Shape(layers.len()));
        }
        Ok(Self { layers })
    }

    /// Topmost layer that has the page, and what it says.
    fn find(&self, page: u64) -> (usize, Lookup) {
        for (i, layer) in self.layers.iter().enumerate().rev() {
            match layer.source().lookup(page) {
                Lookup::Absent => {}
                found => return (i, found),
            }
        }
        // Not reached: the flat layer at the bottom has every page.
        (0, Lookup::At(page))
    }

    /// Reads one page.
    pub fn read_page(&self, page: u64, buffer: &mut [u8]) -> Result<PageKind, SourceError> {
        let (layer, found) = self.find(page);
        match found {
            Lookup::At(place) => {
                self.layers[layer].source().read(place, page, buffer)?;
                Ok(PageKind::Data)
            }
            Lookup::Zero | Lookup::Absent => Ok(PageKind::Zero),
        }
    }

    /// Reads consecutive pages, zeros included, from whichever layers have them.
    pub fn read_pages(&self, first: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let (mut page, mut rest) = (first, buffer);
        while !rest.is_empty() {
            let run = self.run(page, rest.len() as u64 / PAGE);
            let (now, later) = rest.split_at_mut((run.pages * PAGE) as usize);
            match self.find(page) {
                (layer, Lookup::At(place)) => {
                    self.layers[layer].source().read(place, page, now)?;
                }
                (_, Lookup::Zero | Lookup::Absent) => now.fill(0),
            }
            page += run.pages;
            rest = later;
        }
        Ok(())
    }

    /// The layers above the flat one, bottom first.
    pub fn deltas(&self) -> impl Iterator<Item = &DeltaLayer> {
        self.layers.iter().filter_map(|layer| match layer {
            OpenLayer::Delta(delta) => Some(&**delta),
            OpenLayer::Flat(_) => None,
        })
    }

    /// Size of the memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        // The flat layer has every page in its place.
        self.layers.first().map_or(0, |layer| layer.fingerprint().len)
    }

    /// Reads the pages of a [`RunKind::Read`] run.
    pub fn read_run(
        &self,
        layer: usize,
        place: u64,
        page: u64,
        buffer: &mut [u8],
    ) -> Result<(), SourceError> {
        self.layers[layer].source().read(place, page, buffer)
    }

    /// The longest run at `first` that can be had in one go, up to `max` pages.
    pub fn run(&self, first: u64, max: u64) -> Run {
        let (layer, found) = self.find(first);
        let follows = |i: u64| {
            let (next_layer, next) = self.find(first + i);
            match (found, next) {
                (Lookup::Zero, Lookup::Zero) => true,
                (Lookup::At(place), Lookup::At(next)) => next_layer == layer && next == place + i,
                _ => false,
            }
        };
        let pages = (1..max).find(|i| !follows(*i)).unwrap_or(max).max(1);
        let kind = match found {
            Lookup::At(place) => match self.layers[layer].source().mapped(place) {
                Some(address) => RunKind::Mapped(address),
                None => RunKind::Read { layer, place },
            },
            Lookup::Zero | Lookup::Absent => RunKind::Zero,
        };
        Run { pages, kind }
    }

    /// Has a [`RunKind::Mapped`] run ready, so that installing it waits for nothing.
    pub fn populate(&self, page: u64, pages: u64) -> Result<(), SourceError> {
        match self.find(page) {
            (layer, Lookup::At(place)) => self.layers[layer].source().populate(place, page, pages),
            _ => Ok(()),
        }
    }

    /// Fails when a file of the chain was changed since it was opened.
    pub fn check_unchanged(&self) -> Result<(), SourceError> {
        self.layers.iter().try_for_each(|layer| layer.source().check_unchanged())
    }

    /// Tells the kernel that these pages are wanted soon.
    pub fn will_need(&self, pages: std::ops::Range<u64>) {
        let mut page = pages.start;
        while page < pages.end {
            let run = self.run(page, pages.end - page);
            if let (layer, Lookup::At(place)) = self.find(page) {
                self.layers[layer].source().will_need(place, run.pages);
            }
            page += run.pages;
        }
    }
}
