//! Guest memory regions: where the pages of the memory file lie in the VMM's address space.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::uffd::{HUGE_PAGE, PAGE};

/// Most regions a VMM may have; Firecracker has up to three and some hot-plugged ones.
const MAX_REGIONS: usize = 64;
/// First address beyond user space on x86-64 with five-level page tables.
const ADDRESS_END: u64 = 1 << 56;

/// One mapping of guest memory in the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Address in the VMM.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
    /// Where its contents begin in the memory file.
    pub offset: u64,
    /// Page size of the mapping: 4 KiB or 2 MiB.
    pub page_size: u64,
}

/// Why a set of regions is not a guest's memory.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RegionError {
    /// None, or more than any VMM has.
    #[error("{0} regions; there must be 1 to {MAX_REGIONS}")]
    Count(usize),
    /// Neither 4 KiB nor 2 MiB pages.
    #[error("page size {0} is neither 4096 nor 2097152")]
    PageSize(u64),
    /// Something is not a multiple of the page size, or there is nothing.
    #[error("region {0:?} is empty or not made of whole pages")]
    Unaligned(Region),
    /// The region leaves the address space.
    #[error("region {0:?} lies outside the address space")]
    OutOfRange(Region),
    /// Two regions share addresses.
    #[error("regions {0:?} and {1:?} overlap")]
    Overlap(Region, Region),
    /// The regions leave out or repeat a part of the memory file.
    #[error("offset {found} follows where {expected} must")]
    Offset {
        /// Where the next region has to begin.
        expected: u64,
        /// Where it begins.
        found: u64,
    },
    /// The regions are smaller or larger than the memory file.
    #[error("the regions hold {found} bytes, the guest's memory has {expected}")]
    Total {
        /// Size of the guest's memory.
        expected: u64,
        /// Sum of the regions.
        found: u64,
    },
}

/// Checks that the regions cover a memory file of `memory_bytes` exactly; sorts them by offset.
pub fn validate(mut regions: Vec<Region>, memory_bytes: u64) -> Result<Vec<Region>, RegionError> {
    if regions.is_empty() || regions.len() > MAX_REGIONS {
        return Err(RegionError::Count(regions.len()));
    }
    for region in &regions {
        let unit = region.page_size;
        if unit != PAGE && unit != HUGE_PAGE {
            return Err(RegionError::PageSize(unit));
        }
        // Offsets need only whole 4 KiB pages: a 2 MiB page may begin anywhere in the file.
        let whole = region.base % unit == 0 && region.size % unit == 0 && region.offset % PAGE == 0;
        if region.size == 0 || !whole {
            return Err(RegionError::Unaligned(*region));
        }
        if region.base.checked_add(region.size).is_none_or(|end| end > ADDRESS_END) {
            return Err(RegionError::OutOfRange(*region));
        }
    }
    regions.sort_by_key(|region| region.base);
    for pair in regions.windows(2) {
        if pair[0].base + pair[0].size > pair[1].base {
            return Err(RegionError::Overlap(pair[0], pair[1]));
        }
    }
    regions.sort_by_key(|region| region.offset);
    let mut next = 0_u64;
    for region in &regions {
        if region.offset != next {
            return Err(RegionError::Offset { expected: next, found: region.offset });
        }
        // No overflow: sizes are below 2^56 and there are at most 64.
        next += region.size;
    }
    if next != memory_bytes {
        return Err(RegionError::Total { expected: memory_bytes, found: next });
    }
    Ok(regions)
}

/// One page as the VMM maps it, 4 KiB or 2 MiB: the unit of installation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Its address in the VMM.
    pub address: u64,
    /// First 4 KiB page of the memory file in it.
    pub page: u64,
    /// 4 KiB pages in it: 1 or 512.
    pub pages: u64,
}

/// Translates between addresses in the VMM and pages of the memory file.
#[derive(Debug)]
pub struct RegionMap(Vec<Region>);

impl RegionMap {
    /// For regions that [`validate`] returned.
    pub fn new(regions: Vec<Region>) -> Self {
        Self(regions)
    }

    /// All regions, by file offset.
    pub fn regions(&self) -> &[Region] {
        &self.0
    }

    /// The page that holds an address.
    pub fn unit_at(&self, address: u64) -> Option<Unit> {
        let region =
            self.0.iter().find(|r| address.checked_sub(r.base).is_some_and(|d| d < r.size))?;
        let into = (address - region.base) / region.page_size * region.page_size;
        Some(Unit {
            address: region.base + into,
            page: (region.offset + into) / PAGE,
            pages: region.page_size / PAGE,
        })
    }

    /// The pages of the memory file that a range of addresses covers, region by region.
    pub fn pages_in(&self, start: u64, end: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
        self.0.iter().filter_map(move |r| {
            let from = start.max(r.base).next_multiple_of(PAGE);
            let to = end.min(r.base + r.size) / PAGE * PAGE;
            (from < to).then(|| (r.offset + from - r.base) / PAGE..(r.offset + to - r.base) / PAGE)
        })
    }

    /// The region that holds a page of the memory file.
    pub fn region_of_page(&self, page: u64) -> Option<&Region> {
        let offset = page * PAGE;
        let after = self.0.partition_point(|region| region.offset <= offset);
        self.0[..after].last().filter(|region| offset - region.offset < region.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(base: u64, size: u64, offset: u64) -> Region {
        Region { base, size, offset, page_size: PAGE }
    }

    #[test]
    fn a_split_memory_is_accepted_and_translated() {
        let memory = vec![region(0x9000_0000, 0x3000, 0x2000), region(0x1000_0000, 0x2000, 0)];
        let map = RegionMap::new(validate(memory, 0x5000).unwrap());
        let unit = map.unit_at(0x9000_1abc).unwrap();
        assert_eq!(unit, Unit { address: 0x9000_1000, page: 3, pages: 1 });
        assert_eq!(map.unit_at(0x9000_3000), None);
        assert_eq!(map.unit_at(0x0fff_ffff), None);
        assert_eq!(map.region_of_page(1).unwrap().base, 0x1000_0000);
        assert_eq!(map.region_of_page(2).unwrap().base, 0x9000_0000);
        assert_eq!(map.region_of_page(5), None);
        let pages: Vec<_> = map.pages_in(0x1000_1000, 0x9000_2000).collect();
        assert_eq!(pages, [1..2, 2..4]);
    }

    #[test]
    fn lies_are_refused() {
        let bad = |regions: Vec<Region>| validate(regions, 0x4000).unwrap_err();
        assert_eq!(bad(vec![]), RegionError::Count(0));
        assert!(matches!(bad(vec![region(0x1001, 0x4000, 0)]), RegionError::Unaligned(_)));
        assert!(matches!(bad(vec![region(0x1000, 0, 0)]), RegionError::Unaligned(_)));
        assert!(matches!(bad(vec![region(!0xfff, 0x4000, 0)]), RegionError::OutOfRange(_)));
        assert_eq!(
            bad(vec![region(0, 0x2000, 0)]),
            RegionError::Total { expected: 0x4000, found: 0x2000 }
        );
        let overlap = vec![region(0x1000, 0x2000, 0), region(0x2000, 0x2000, 0x2000)];
        assert!(matches!(bad(overlap), RegionError::Overlap(..)));
        let repeat = vec![region(0x1000, 0x2000, 0), region(0x9000, 0x2000, 0x1000)];
        assert!(matches!(bad(repeat), RegionError::Offset { .. }));
        let odd = Region { page_size: 8192, ..region(0, 0x4000, 0) };
        assert_eq!(bad(vec![odd]), RegionError::PageSize(8192));
    }
}
