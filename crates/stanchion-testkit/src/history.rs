//! Histories: what was asked, answered and believed, and whether that can be.
