//! The live page, as a browser asks for it.

use std::net::SocketAddr;

use manyhands_coordinator::{CoordinatorConfig, RunManifest, StartError, start};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::peer::key;
use crate::world::{World, run_file, within};

async fn get(address: &str, path: &str, host: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("the page listens");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    within("the answer", stream.read_to_string(&mut answer)).await.expect("text");
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn page_status_and_metrics_are_served_to_this_machine_alone() {
    let world = World::new(run_file()).await;
    let url = world.handle().page_url();
    let address = url.trim_start_matches("http://").trim_end_matches('/');
    let page = get(address, "/", address).await;
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("frame-ancestors 'none'"));
    assert!(!page.contains("src=\"http") && !page.contains("href=\"http"));

    let status = get(address, "/status.json", "localhost").await;
    let body = status.split_once("\r\n\r\n").expect("a body").1;
    let json: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(json["run"]["phase"], "gathering");
    let metrics = get(address, "/metrics", address).await;
    assert!(metrics.contains("manyhands_coordinator_inputs_total"), "{metrics}");
    let rebound = get(address, "/status.json", "evil.example").await;
    assert!(rebound.starts_with("HTTP/1.1 403"), "{rebound}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_for_the_whole_world_or_on_a_busy_port_is_refused() {
    let world = World::new(run_file()).await;
    let manifest = RunManifest::read(world.folder()).expect("readable").expect("there");
    let elsewhere = tempfile::tempdir().expect("folder");
    let folder = elsewhere.path().to_owned();
    let config = CoordinatorConfig::new(folder, key(100), manifest);
    let everywhere = SocketAddr::from(([0, 0, 0, 0], 0));
    let open = CoordinatorConfig { page_listen: everywhere, ..config.clone() };
    assert!(matches!(start(open).await, Err(StartError::Page(_))));

    let url = world.handle().page_url();
    let busy = url.trim_start_matches("http://").trim_end_matches('/').parse().expect("address");
    let taken = CoordinatorConfig { page_listen: busy, ..config };
    let refused = start(taken).await.err().expect("the port is taken");
    assert!(refused.to_string().contains("choose another port"), "{refused}");
}
