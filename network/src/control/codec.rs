//! Control messages on a stream: four bytes of length (little-endian), then that many bytes.

use std::io;

use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::StreamProtocol;
use libp2p::request_response::Codec;

/// A request as it is sent and as it arrives.
#[derive(Debug)]
pub(super) enum Asked {
    Whole(Vec<u8>),
    /// More was announced than the limit, and nothing read. libp2p tells nobody of a request that
    /// could not be read, so this is not an error: its sender is to be known.
    TooLong {
        announced: u32,
    },
}

/// Byte strings with a limit each way. What a peer announces is compared with the limit and then
/// read as it arrives: no memory is taken by its word.
#[derive(Debug, Clone)]
pub(super) struct BoundedCodec {
    pub(super) request_bytes_max: usize,
    pub(super) response_bytes_max: usize,
}

async fn read(io: &mut (impl AsyncRead + Unpin + Send), limit: usize) -> io::Result<Asked> {
    let mut length = [0; 4];
    io.read_exact(&mut length).await?;
    let announced = u32::from_le_bytes(length);
    if announced as usize > limit {
        return Ok(Asked::TooLong { announced });
    }
    let mut bytes = Vec::new();
    io.take(announced.into()).read_to_end(&mut bytes).await?;
    if bytes.len() < announced as usize {
        let text = format!("expected {announced} bytes, the stream ended after {}", bytes.len());
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
    }
    Ok(Asked::Whole(bytes))
}

/// The bytes of a message that keeps to the limit.
fn whole(message: Asked, limit: usize) -> io::Result<Vec<u8>> {
    match message {
        Asked::Whole(bytes) => Ok(bytes),
        Asked::TooLong { announced } => {
            let text =
                format!("expected a message of at most {limit} bytes, {announced} were announced");
            Err(io::Error::new(io::ErrorKind::InvalidData, text))
        }
    }
}

async fn write(
    io: &mut (impl AsyncWrite + Unpin + Send),
    bytes: &[u8],
    limit: usize,
) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).ok().filter(|length| *length as usize <= limit);
    let Some(length) = length else {
        let text = format!("expected a message of at most {limit} bytes, got {}", bytes.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    };
    io.write_all(&length.to_le_bytes()).await?;
    io.write_all(bytes).await?;
    io.close().await
}

impl Codec for BoundedCodec {
    type Protocol = StreamProtocol;
    type Request = Asked;
    type Response = Vec<u8>;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Asked>
    where
        T: AsyncRead + Unpin + Send,
    {
        read(io, self.request_bytes_max).await
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
    where
        T: AsyncRead + Unpin + Send,
    {
        whole(read(io, self.response_bytes_max).await?, self.response_bytes_max)
    }

    async fn write_request<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        request: Asked,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        let request = whole(request, self.request_bytes_max)?;
        write(io, &request, self.request_bytes_max).await
    }

    async fn write_response<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        response: Vec<u8>,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write(io, &response, self.response_bytes_max).await
    }
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;
    use futures::io::Cursor;

    use super::*;

    #[test]
    fn a_message_survives_and_the_limit_is_exact() {
        let mut wire = Cursor::new(Vec::new());
        block_on(write(&mut wire, b"hello", 5)).expect("fits");
        wire.set_position(0);
        let read_back = block_on(read(&mut wire, 5)).expect("fits");
        assert_eq!(whole(read_back, 5).expect("fits"), b"hello");
        wire.set_position(0);
        let too_long = block_on(read(&mut wire, 4)).expect("is told");
        let error = whole(too_long, 4).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let error =
            block_on(write(&mut Cursor::new(Vec::new()), b"hello", 4)).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_length_that_lies_costs_nothing_and_fails() {
        let huge = block_on(read(&mut Cursor::new([255, 255, 255, 255, 1, 2]), 100));
        assert!(matches!(huge, Ok(Asked::TooLong { announced: u32::MAX })), "{huge:?}");
        for lie in [&[9, 0, 0, 0, 1, 2][..], &[9, 0]] {
            assert!(block_on(read(&mut Cursor::new(lie), 100)).is_err());
        }
    }
}
