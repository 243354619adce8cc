//! Finding a run by its id: coordinators publish provider records, searchers ask for them and then
//! for the providers' addresses. A record can be crowded out by those of impostors, so the coordinator
//! that the searcher means is always among those looked for.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use libp2p::kad::store::RecordStore;
use libp2p::kad::{
    self, GetClosestPeersOk, GetClosestPeersResult, GetProvidersOk, GetProvidersResult,
    InboundRequest, QueryId, QueryResult, RecordKey,
};
use libp2p::{Multiaddr, PeerId};
use manyhands_proto::{NodeId, RunId};
use tokio::sync::oneshot;

use super::messages::{FindError, Located};
use crate::identity;

type Kad = kad::Behaviour<kad::store::MemoryStore>;
type FindReply = oneshot::Sender<Result<Vec<Located>, FindError>>;

const SEARCHES_MAX: usize = 64;
/// Coordinators of one run that are looked up; there is one, and the searcher knows which.
const PROVIDERS_MAX: usize = 8;
const ADDRESSES_MAX: usize = 16;

#[derive(Default)]
pub(super) struct Finding {
    queries: HashMap<QueryId, Query>,
    searches: BTreeMap<u64, Search>,
    next_search: u64,
}

enum Query {
    Publish,
    Providers { search: u64 },
    Addresses { search: u64 },
}

struct Search {
    reply: FindReply,
    providers: BTreeSet<PeerId>,
    addresses: BTreeMap<PeerId, Vec<Multiaddr>>,
    /// Address queries under way.
    pending: usize,
}

fn key(run: RunId) -> RecordKey {
    RecordKey::new(run.as_bytes())
}

impl Finding {
    pub(super) fn provide(&mut self, kad: &mut Kad, run: RunId) -> Result<(), FindError> {
        let query =
            kad.start_providing(key(run)).map_err(|error| FindError::Record(error.to_string()))?;
        self.queries.insert(query, Query::Publish);
        Ok(())
    }

    pub(super) fn find(
        &mut self,
        kad: &mut Kad,
        run: RunId,
        coordinator: NodeId,
        reply: FindReply,
    ) {
        // A send fails only if the searcher has given up.
        if self.searches.len() >= SEARCHES_MAX {
            let _ = reply.send(Err(FindError::TooMany { limit: SEARCHES_MAX }));
            return;
        }
        if kad.kbuckets().next().is_none() {
            let _ = reply.send(Err(FindError::NobodyToAsk));
            return;
        }
        let search = self.next_search;
        self.next_search += 1;
        let providers = BTreeSet::from([identity::peer_id(&coordinator)]);
        let state = Search { reply, providers, addresses: BTreeMap::new(), pending: 0 };
        self.searches.insert(search, state);
        self.queries.insert(kad.get_providers(key(run)), Query::Providers { search });
    }

    pub(super) fn handle_progress(
        &mut self,
        kad: &mut Kad,
        query: QueryId,
        result: QueryResult,
        last: bool,
    ) {
        match (self.queries.get(&query), result) {
            (Some(Query::Providers { search }), QueryResult::GetProviders(result)) => {
                let search = *search;
                self.handle_providers(kad, search, result, last);
            }
            (Some(Query::Addresses { search }), QueryResult::GetClosestPeers(result)) => {
                let search = *search;
                self.handle_addresses(search, result, last);
            }
            (_, QueryResult::StartProviding(Err(error))) => {
                tracing::info!(%error, "a run's record is not published yet");
            }
            (
                Some(Query::Publish | Query::Providers { .. } | Query::Addresses { .. }) | None,
                _,
            ) => {}
        }
        if last {
            self.queries.remove(&query);
        }
    }

    fn handle_providers(
        &mut self,
        kad: &mut Kad,
        search: u64,
        result: GetProvidersResult,
        last: bool,
    ) {
        let Some(state) = self.searches.get_mut(&search) else { return };
        match result {
            Ok(GetProvidersOk::FoundProviders { providers, .. }) => {
                for provider in providers {
                    if state.providers.len() < PROVIDERS_MAX {
                        state.providers.insert(provider);
                    }
                }
            }
            Ok(GetProvidersOk::FinishedWithNoAdditionalRecord { .. })
            | Err(kad::GetProvidersError::Timeout { .. }) => {}
        }
        if !last {
            return;
        }
        for provider in state.providers.clone() {
            self.queries.insert(kad.get_closest_peers(provider), Query::Addresses { search });
            state.pending += 1;
        }
        self.finish(search);
    }

    fn handle_addresses(&mut self, search: u64, result: GetClosestPeersResult, last: bool) {
        let Some(state) = self.searches.get_mut(&search) else { return };
        let peers = match result {
            Ok(GetClosestPeersOk { peers, .. })
            | Err(kad::GetClosestPeersError::Timeout { peers, .. }) => peers,
        };
        for peer in peers {
            if state.providers.contains(&peer.peer_id) {
                let known = state.addresses.entry(peer.peer_id).or_default();
                for address in peer.addrs {
                    if known.len() < ADDRESSES_MAX && !known.contains(&address) {
                        known.push(address);
                    }
                }
            }
        }
        if last {
            state.pending -= 1;
            self.finish(search);
        }
    }

    fn finish(&mut self, search: u64) {
        if self.searches.get(&search).is_none_or(|state| state.pending > 0) {
            return;
        }
        let Some(state) = self.searches.get_mut(&search) else { return };
        let located: Vec<Located> = std::mem::take(&mut state.addresses)
            .into_iter()
            .filter(|(_, addresses)| !addresses.is_empty())
            .filter_map(|(peer, addresses)| {
                Some(Located { node: identity::node_id(&peer).ok()?, addresses })
            })
            .collect();
        let found = if located.is_empty() { Err(FindError::NotFound) } else { Ok(located) };
        self.answer(search, found);
    }

    fn answer(&mut self, search: u64, result: Result<Vec<Located>, FindError>) {
        if let Some(state) = self.searches.remove(&search) {
            // Only fails if the searcher has given up.
            let _ = state.reply.send(result);
        }
    }
}

/// Keeps what is worth keeping of what others publish: who coordinates which run, never values.
pub(super) fn handle_inbound(kad: &mut Kad, request: InboundRequest) {
    if let InboundRequest::AddProvider { record: Some(mut record) } = request {
        let is_run = RunId::try_from(record.key.as_ref()).is_ok();
        if is_run && identity::node_id(&record.provider).is_ok() {
            record.addresses.truncate(ADDRESSES_MAX);
            if let Err(error) = kad.store_mut().add_provider(record) {
                tracing::debug!(%error, "a run's record was not kept");
            }
        }
    }
}
