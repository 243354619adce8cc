//! The embedded chain as its clients meet it: over JSON-RPC on loopback, on a real disk.

mod client;
mod disk;
mod requests;
mod transactions;
