//! A node's metrics, for a Prometheus on this machine.

use std::net::Ipv4Addr;

use metrics_exporter_prometheus::PrometheusBuilder;

use crate::failure::{Explain, Failure};

/// Where a node that has no live page shows its metrics.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct MetricsArg {
    /// Serve metrics for Prometheus on this port of this machine.
    #[arg(long, value_name = "PORT")]
    metrics_port: Option<u16>,
}

impl MetricsArg {
    /// Records and serves from here on, if a port was named. Needs a runtime.
    pub(crate) fn serve(self) -> Result<(), Failure> {
        let Some(port) = self.metrics_port else { return Ok(()) };
        let builder = PrometheusBuilder::new().with_http_listener((Ipv4Addr::LOCALHOST, port));
        builder
            .install()
            .explain("metrics", "choose another port with --metrics-port, or leave it out")
    }
}
