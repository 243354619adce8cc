//! Real processes on loopback
