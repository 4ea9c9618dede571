//! One open layer for all VMs that use the same file.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Weak};

use crate::seal::Key;
use crate::source::{DeltaLayer, Fingerprint, FlatLayer, LayerFiles, OpenLayer, SourceError};

enum Known {
    Flat(Weak<FlatLayer>),
    Delta(Weak<DeltaLayer>),
}

impl Known {
    fn upgrade(&self) -> Option<OpenLayer> {
        match self {
            Self::Flat(layer) => layer.upgrade().map(OpenLayer::Flat),
            Self::Delta(layer) => layer.upgrade().map(OpenLayer::Delta),
        }
    }
}

/// Layers in use, by their files and what state these were in.
#[derive(Default)]
pub(super) struct LayerCache(HashMap<(LayerFiles, Fingerprint, u64), Known>);

impl LayerCache {
    /// The layer for these open files: one in use, or a new one.
    pub(super) fn get(
        &mut self,
        files: &LayerFiles,
        open: Vec<File>,
        key: Option<&Key>,
        memory_bytes: u64,
    ) -> Result<OpenLayer, SourceError> {
        self.0.retain(|_, known| known.upgrade().is_some());
        if let Some(file) = open.first()
            && let Ok(fingerprint) = Fingerprint::of(file)
            && let Some(layer) =
                self.0.get(&(files.clone(), fingerprint, memory_bytes)).and_then(Known::upgrade)
        {
            return Ok(layer);
        }
        let layer = OpenLayer::from_files(files, open, key, memory_bytes)?;
        let known = match &layer {
            OpenLayer::Flat(layer) => Known::Flat(Arc::downgrade(layer)),
            OpenLayer::Delta(layer) => Known::Delta(Arc::downgrade(layer)),
        };
        self.0.insert((files.clone(), layer.fingerprint(), memory_bytes), known);
        Ok(layer)
    }
}
