//! Control messages on a stream: four bytes of length (little-endian), then that many bytes.

use std::io;

use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::StreamProtocol;
use libp2p::request_response::Codec;

/// Byte strings with a limit each way. What a peer announces is compared with the limit and then
/// read as it arrives: no memory is taken by its word.
#[derive(Debug, Clone)]
pub(super) struct BoundedCodec {
    pub(super) request_bytes_max: usize,
    pub(super) response_bytes_max: usize,
}

async fn read(io: &mut (impl AsyncRead + Unpin + Send), limit: usize) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    io.read_exact(&mut length).await?;
    let length = u32::from_le_bytes(length);
    if length as usize > limit {
        let text = format!("expected a message of at most {limit} bytes, {length} were announced");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut bytes = Vec::new();
    io.take(length.into()).read_to_end(&mut bytes).await?;
    if bytes.len() < length as usize {
        let text = format!("expected {length} bytes, the stream ended after {}", bytes.len());
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
    }
    Ok(bytes)
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
    type Request = Vec<u8>;
    type Response = Vec<u8>;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
    where
        T: AsyncRead + Unpin + Send,
    {
        read(io, self.request_bytes_max).await
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
    where
        T: AsyncRead + Unpin + Send,
    {
        read(io, self.response_bytes_max).await
    }

    async fn write_request<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        request: Vec<u8>,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
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
        assert_eq!(block_on(read(&mut wire, 5)).expect("fits"), b"hello");
        wire.set_position(0);
        let error = block_on(read(&mut wire, 4)).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let error =
            block_on(write(&mut Cursor::new(Vec::new()), b"hello", 4)).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_length_that_lies_costs_nothing_and_fails() {
        for lie in [&[255, 255, 255, 255, 1, 2][..], &[9, 0, 0, 0, 1, 2], &[9, 0]] {
            assert!(block_on(read(&mut Cursor::new(lie), 100)).is_err());
        }
    }
}
