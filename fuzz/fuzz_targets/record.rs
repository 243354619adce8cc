//! Records of rounds, as an auditor reads them from anybody: refused, or in the one form that means them.
#![no_main]

use std::alloc::System;

use cap::Cap;
use libfuzzer_sys::fuzz_target;
use manyhands_rules::record::RoundRecord;

/// An allocation past this aborts: some hundreds of times what the fuzzer writes.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, 4 << 20);

fuzz_target!(|bytes: &[u8]| {
    if let Ok(record) = RoundRecord::parse(bytes) {
        assert_eq!(record.canonical_bytes(), bytes);
        let _ = (record.digest(), record.commit_set(), record.admitted_set());
    }
});
