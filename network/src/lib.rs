//! Sockets in, inputs out: libp2p finds peers and carries small messages (the control plane,
//! [`control`]), a QUIC endpoint of our own moves blobs (the data plane, [`data`]).
//!
//! Both planes prove the same identity: the TLS certificate of the data plane is the peer's libp2p
//! certificate, and a peer id is an encoding of the [`NodeId`](manyhands_proto::NodeId). This crate
//! does not know what a round is: control messages are byte strings that `proto` parses, and
//! [`data::BlobStore`] is asked before anything is served.

mod bucket;
pub mod control;
pub mod data;
pub mod identity;
pub mod invitation;
pub mod metrics;
mod origin;

pub use libp2p::Multiaddr;
