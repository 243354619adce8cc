//! The data plane's TLS: the certificate is the peer's libp2p certificate, the cipher order is ours.
//!
//! libp2p-tls's own configurations put ChaCha20-Poly1305 first; with AES-128-GCM first a bulk
//! transfer takes 20–60 % less time on any CPU with AES instructions. The certificate format and its
//! checks are libp2p-tls's.

use std::sync::Arc;

use libp2p::PeerId;
use libp2p::identity::Keypair;
use libp2p_tls::certificate;
use manyhands_proto::NodeId;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, sign::any_ecdsa_type};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use crate::identity;

/// Not libp2p's: the two planes refuse each other's connections.
const ALPN: &[u8] = b"/manyhands/data/1";

/// What a peer is called in the handshake; nothing looks at it, but QUIC wants a name.
pub(super) const SERVER_NAME: &str = "manyhands";

/// Why a TLS identity could not be made from a key.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a TLS identity from the node's key: {0}")]
pub struct TlsError(String);

/// This node's certificate and the provider, shared by every connection.
#[derive(Clone)]
pub(super) struct TlsIdentity {
    certificate: Arc<SingleCertAndKey>,
    provider: Arc<CryptoProvider>,
}

impl TlsIdentity {
    pub(super) fn new(keypair: &Keypair) -> Result<Self, TlsError> {
        let (certificate, key) =
            certificate::generate(keypair).map_err(|error| TlsError(error.to_string()))?;
        let key = any_ecdsa_type(&key).map_err(|error| TlsError(error.to_string()))?;
        let mut provider = default_provider();
        provider.cipher_suites = vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ];
        // A resolver, because `with_single_cert` refuses libp2p's critical extension.
        let certificate = Arc::new(CertifiedKey::new(vec![certificate], key).into());
        Ok(Self { certificate, provider: Arc::new(provider) })
    }

    pub(super) fn server(&self) -> Result<QuicServerConfig, TlsError> {
        let mut config = rustls::ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| TlsError(error.to_string()))?
            .with_client_cert_verifier(Arc::new(PeerVerifier { expected: None }))
            .with_cert_resolver(self.certificate.clone());
        config.alpn_protocols = vec![ALPN.to_vec()];
        // A resumed session would not show its certificate again.
        config.send_tls13_tickets = 0;
        QuicServerConfig::try_from(config).map_err(|error| TlsError(error.to_string()))
    }

    /// A client that completes the handshake with `expected` and with nobody else.
    pub(super) fn client(&self, expected: PeerId) -> Result<QuicClientConfig, TlsError> {
        let verifier = PeerVerifier { expected: Some(expected) };
        let mut config = rustls::ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| TlsError(error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(self.certificate.clone());
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        QuicClientConfig::try_from(config).map_err(|error| TlsError(error.to_string()))
    }
}

/// Who is at the other end, or `None` if its certificate is not a node's. The side that accepted
/// must ask before it serves: a dialler's handshake completes before its certificate is checked.
pub(super) fn remote_node(connection: &quinn::Connection) -> Option<NodeId> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    let [certificate] = &chain[..] else { return None };
    let peer = certificate::parse(certificate).ok()?.peer_id();
    identity::node_id(&peer).ok()
}

#[derive(Debug)]
struct PeerVerifier {
    expected: Option<PeerId>,
}

impl PeerVerifier {
    fn check(&self, first: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Result<(), Error> {
        if !rest.is_empty() {
            let count = rest.len() + 1;
            return Err(Error::General(format!("expected one certificate, got {count}")));
        }
        let got = certificate::parse(first)?.peer_id();
        match self.expected {
            Some(expected) if expected != got => {
                Err(Error::General(format!("expected peer {expected}, got {got}")))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn check_signature(
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        certificate::parse(certificate)?.verify_signature(
            signed.scheme,
            message,
            signed.signature(),
        )?;
        Ok(HandshakeSignatureValid::assertion())
    }

    fn refuse_tls12() -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("expected TLS 1.3, got TLS 1.2".to_owned()))
    }

    fn schemes() -> Vec<SignatureScheme> {
        vec![
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ED25519,
        ]
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        first: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(first, rest).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        first: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(first, rest).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}
